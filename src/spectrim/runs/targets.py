"""Build objects from a configuration, which may name only the classes that are allowed here."""

import os
from collections.abc import Iterator
from pkgutil import resolve_name
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig

from spectrim.errors import UserError
from spectrim.runs.configuration import innermost

PACKAGES = ("spectrim.", "torch.", "torchvision.")
# The modules that hold the parts of a run. Other modules of these packages run commands, load libraries and write
# files.
PLACES = (
    "spectrim.algorithms.",
    "spectrim.data.",
    "spectrim.decomposers.",
    "spectrim.models.",
    "spectrim.runs.tracking.",
    "spectrim.training.recipe.",
    "torch.nn.",
    "torchvision.models.",
)
UNPICKLING = ("torch.load", "torch.hub", "torch.serialization", "torch.package", "torch.jit")


def entries(node: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield the place, the key or index, and the value of every entry in nested mappings and lists."""
    if isinstance(node, DictConfig | dict):
        found = [(f"{where}.{key!s}", key, value) for key, value in node.items()]
    elif isinstance(node, ListConfig | list):
        found = [(f"{where}[{index}]", index, value) for index, value in enumerate(node)]
    else:
        return
    for place, key, value in found:
        yield place, key, value
        yield from entries(value, place)


def check_targets(node: Any, where: str = "config") -> None:
    """Refuse, before anything is imported, every ``_target_`` outside ``PLACES``."""
    for place, key, value in entries(node, where):
        reason = _refusal(str(value)) if key == "_target_" else ""
        if reason:
            raise UserError(f"{place}={value} is refused: {reason}")


def _refusal(target: str) -> str:
    """Return why ``target`` is refused, by its name alone; empty where it is allowed."""
    if not target.startswith(PACKAGES):
        return "only spectrim, torch and torchvision may be used"
    if target.startswith(UNPICKLING):
        return "it may run code from a file; nothing is unpickled"
    if not target.startswith(PLACES) or any(part.startswith("_") for part in target.split(".")):
        return f"it is no part of a run; those come from {', '.join(place[:-1] for place in PLACES)}"
    return ""


def _check_homes(node: Any) -> None:
    """Refuse a name that an allowed module merely imports, such as its ``os.system``, and an unknown name."""
    for target in [value for _, key, value in entries(node, "") if key == "_target_"]:
        try:
            home = getattr(resolve_name(target), "__module__", None) or target  # functions written in C may have none
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"_target_={target} cannot be found: {error}") from error
        if not f"{home}.".startswith(PLACES):
            raise UserError(f"_target_={target} is refused: it belongs to {home}, where no part of a run comes from")


def build(settings: dict[str, Any], *can: str) -> Any:
    """Build the object that ``settings`` describes by its ``_target_``.

    ``can``: methods of which the object must have one.
    Raises ``UserError`` in one line.
    """
    check_targets(settings)
    if "torchvision." in str(settings):
        # Imported here, because it needs torch, which a check of names does not.
        from spectrim.tools import torchvision_shim

        torchvision_shim.prepare()
        # torchvision fetches weights without asking torch.load for tensors alone.
        os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    _check_homes(settings)
    try:
        made = instantiate(settings, _convert_="all")
    except HydraException as error:
        raise UserError(innermost(error)) from error
    if can and not any(callable(getattr(made, method, None)) for method in can):
        kind, wanted = type(made).__name__, " or ".join(can)
        raise UserError(f"_target_={settings.get('_target_')} gives a {kind}, which has no method {wanted}")
    return made
