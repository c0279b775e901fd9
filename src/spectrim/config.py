"""From a composed configuration to objects: where it lies, what it may name, and its errors in one line."""

import re
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, TextIO

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spectrim import torchvision_shim
from spectrim.errors import UserError

ALLOWED_TARGETS = ("spectrim.", "torch.", "torchvision.")
UNPICKLING = ("torch.load", "torch.hub", "torch.serialization", "torch.package", "torch.jit")
_CHECKOUT = Path(__file__).resolve().parents[2] / "conf"
CONF = str(_CHECKOUT if _CHECKOUT.is_dir() else Path(__file__).resolve().parent / "conf")


def check_targets(node: Any, where: str = "config") -> None:
    """Refuse, before anything is imported, every ``_target_`` outside spectrim, torch and torchvision."""
    if isinstance(node, DictConfig | dict):
        for key, value in node.items():
            if key == "_target_" and not str(value).startswith(ALLOWED_TARGETS):
                allowed = "only spectrim, torch and torchvision may be used"
                raise UserError(f"{where}._target_={value} is refused: {allowed}")
            if key == "_target_" and str(value).startswith(UNPICKLING):
                raise UserError(
                    f"{where}._target_={value} is refused: it may run code from a file, nothing is unpickled"
                )
            check_targets(value, f"{where}.{key!s}")
    elif isinstance(node, ListConfig | list):
        for index, value in enumerate(node):
            check_targets(value, f"{where}[{index}]")


def _check_homes(node: Any) -> None:
    """Refuse what an allowed module merely imported, such as ``torch.os.system``, and name what does not exist."""
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _check_homes(value)
    if not isinstance(node, dict) or "_target_" not in node:
        return
    target = node["_target_"]
    try:
        home = getattr(resolve_name(target), "__module__", None) or target  # functions written in C may have none
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"_target_={target} cannot be found: {error}") from error
    if not f"{home}.".startswith(ALLOWED_TARGETS):
        raise UserError(f"_target_={target} is refused: it belongs to {home}, not to spectrim, torch or torchvision")


def plain(node: DictConfig) -> dict[str, Any]:
    """A node with its interpolations resolved, as plain dicts, lists, numbers and strings."""
    return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def build(settings: dict[str, Any]) -> Any:
    """The object that ``settings`` (with its ``_target_``) describes. Raises ``UserError`` in one line."""
    check_targets(settings)
    if "torchvision." in str(settings):
        torchvision_shim.prepare()
    _check_homes(settings)
    try:
        return instantiate(settings, _convert_="all")
    except HydraException as error:
        raise UserError(_innermost(error)) from error


def invocation(program: str) -> str:
    """The command that makes this one run, also where it is one of a grid."""
    return " ".join([program, *HydraConfig.get().overrides.task]) if HydraConfig.initialized() else program


def command_line(job: Callable[[], Any]) -> None:
    """Run a Hydra entry; a person's mistake ends in one line on stderr and exit status 1, Ctrl-C in 130."""
    stderr = _Stderr(sys.stderr)
    try:
        with redirect_stderr(stderr):
            job()
    except KeyboardInterrupt:
        print("spectrim: interrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)
    except (UserError, HydraException, OmegaConfBaseException) as error:
        print(f"spectrim: {_innermost(error)}", file=sys.stderr)
        sys.exit(1)
    except Exception:
        sys.stderr.write(stderr.withheld)
        raise


class _Stderr:
    """stderr, but for the line that Hydra writes about a failed job: a person's mistake is said in one line, ours."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.withheld = stream, ""

    def write(self, text: str) -> int:
        if not text.startswith("Error executing job with overrides:"):
            return self.stream.write(text)
        self.withheld = text
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _innermost(error: BaseException) -> str:
    """The message of the first ``UserError`` in the chain, else what Hydra says, in one line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return str(cause)
        cause = cause.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"\s+", " ", " ".join(lines[:12]))
