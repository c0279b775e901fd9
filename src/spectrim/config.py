"""From a composed configuration to objects: where it lies, what it may name, and its errors in one line."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spectrim.errors import UserError

ALLOWED_TARGETS = ("spectrim.", "torch.", "torchvision.")
_CHECKOUT = Path(__file__).resolve().parents[2] / "conf"
CONF = str(_CHECKOUT if _CHECKOUT.is_dir() else Path(__file__).resolve().parent / "conf")


def check_targets(node: Any, where: str = "config") -> None:
    """Refuse, before anything is imported, every ``_target_`` outside spectrim, torch and torchvision."""
    if isinstance(node, DictConfig | dict):
        for key, value in node.items():
            if key == "_target_" and not str(value).startswith(ALLOWED_TARGETS):
                raise UserError(f"{where}._target_={value} is refused: only spectrim, torch and torchvision are allowed")
            check_targets(value, f"{where}.{key}")
    elif isinstance(node, ListConfig | list):
        for index, value in enumerate(node):
            check_targets(value, f"{where}[{index}]")


def plain(node: DictConfig) -> dict[str, Any]:
    """A node with its interpolations resolved, as plain dicts, lists, numbers and strings."""
    return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def build(settings: dict[str, Any]) -> Any:
    """The object that ``settings`` (with its ``_target_``) describes. Raises ``UserError`` in one line."""
    check_targets(settings)
    try:
        return instantiate(settings, _convert_="all")
    except HydraException as error:
        raise UserError(_innermost(error)) from error


def invocation() -> str:
    """The command as it was typed, without the folder of the program."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def command_line(job: Callable[[], Any]) -> None:
    """Run a Hydra entry; a person's mistake ends in one line on stderr and exit status 1, Ctrl-C in 130."""
    try:
        job()
    except KeyboardInterrupt:
        print("spectrim: interrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(130)
    except (UserError, HydraException, OmegaConfBaseException) as error:
        print(f"spectrim: {_innermost(error)}", file=sys.stderr)
        sys.exit(1)


def _innermost(error: BaseException) -> str:
    """The message of the first ``UserError`` in the chain, else what Hydra says, in one line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return str(cause)
        cause = cause.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"\s+", " ", " ".join(lines[:12]))
