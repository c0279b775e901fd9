"""Build objects from a configuration, which may name only the classes that are allowed here."""

import os
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points
from pkgutil import resolve_name
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig

from spectrim.errors import UserError
from spectrim.records import records
from spectrim.runs.configuration import innermost

# The modules that hold the parts of a run. Other modules of these packages run commands, load libraries and write
# files.
PLACES = (
    "spectrim.algorithms.",
    "spectrim.data.",
    "spectrim.decomposers.",
    "spectrim.models.",
    "spectrim.refit.refinement.",
    "spectrim.runs.tracking.",
    "spectrim.training.recipe.",
    "torch.nn.",
    "torchvision.models.",
)
# Environment variable: packages of the user that hold parts of a run, too, separated by commas.
PLUGINS = "SPECTRIM_PLUGINS"
# Entry points by which an installed package says the same of itself.
GROUP = "spectrim.plugins"
UNPICKLING = ("torch.load", "torch.hub", "torch.serialization", "torch.package", "torch.jit")


def plugins() -> tuple[str, ...]:
    """Return the packages that the user, or an installed package itself, names as holding parts of a run.

    Raises ``UserError`` for a name that is none of a package, or that belongs to Python or to a package of ours.
    """
    named = [name.strip() for name in os.environ.get(PLUGINS, "").split(",") if name.strip()]
    for name in named:
        if not all(part.isidentifier() for part in name.split(".")):
            raise UserError(f"{PLUGINS}={name} is no name of a package; give names such as mypkg, separated by commas")
        if name.partition(".")[0] in sys.stdlib_module_names or f"{name}.".startswith(records.BY_NAME):
            raise UserError(f"{PLUGINS}={name} is refused; name a package of your own")
    return (*named, *_installed())


@cache
def _installed() -> tuple[str, ...]:
    return tuple(point.module for point in entry_points(group=GROUP))


def _places() -> tuple[str, ...]:
    return PLACES + tuple(f"{name}." for name in plugins())


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
    """Refuse, before anything is imported, every ``_target_`` outside ``PLACES`` and the ``plugins``."""
    for place, key, value in entries(node, where):
        reason = _refusal(str(value)) if key == "_target_" else ""
        if reason:
            raise UserError(f"{place}={value} is refused: {reason}")


def _refusal(target: str) -> str:
    """Return why ``target`` is refused, by its name alone; empty where it is allowed."""
    places = _places()
    if not target.startswith((*records.BY_NAME, *places)):
        return f"only spectrim, torch and torchvision may be used, and the packages that {PLUGINS} names"
    if target.startswith(UNPICKLING):
        return "it may run code from a file; nothing is unpickled"
    if not target.startswith(places) or any(part.startswith("_") for part in target.split(".")):
        return f"it is no part of a run; those come from {', '.join(place[:-1] for place in places)}"
    return ""


def _check_homes(node: Any) -> None:
    """Refuse a name that an allowed module merely imports, such as its ``os.system``, and an unknown name."""
    for target in [value for _, key, value in entries(node, "") if key == "_target_"]:
        try:
            home = getattr(resolve_name(target), "__module__", None) or target  # functions written in C may have none
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"_target_={target} cannot be found: {error}") from error
        if not f"{home}.".startswith(_places()):
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
