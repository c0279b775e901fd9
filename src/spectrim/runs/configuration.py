"""A composed configuration: where it lies, its nodes as plain values, the command that gives it, and its errors."""

import shlex
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from spectrim.errors import UserError

_CHECKOUT = Path(__file__).resolve().parents[3] / "conf"
CONF = str(_CHECKOUT if _CHECKOUT.is_dir() else Path(__file__).resolve().parents[1] / "conf")


def plain(node: DictConfig) -> dict[str, Any]:
    """Resolve the interpolations of a node and return plain dicts, lists, numbers and strings."""
    return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def check_seed(cfg: DictConfig) -> None:
    """Refuse a seed that torch would silently read as another one (true, 1.5) or that its generators do not take."""
    if type(cfg.seed) is not int or not 0 <= cfg.seed < 2**32:
        raise UserError(f"seed={cfg.seed!r} is not a whole number in 0..{2**32 - 1}")


def text(cfg: DictConfig, key: str) -> str:
    """Return a name or a path of the configuration. Raises ``UserError`` where it is not text, or is empty."""
    if not isinstance(cfg[key], str) or not cfg[key]:
        raise UserError(f"{key}={cfg[key]!r} is not text; give a name or a path")
    return cfg[key]


def invocation(program: str) -> str:
    """Return the shell command that makes this one run, also inside a grid."""
    return shlex.join([program, *HydraConfig.get().overrides.task]) if HydraConfig.initialized() else program


def innermost(error: BaseException) -> str:
    """The message of the first ``UserError`` in the chain, else what was said, in one line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return str(cause)
        cause = cause.__cause__
    return " ".join(str(error).partition("Config search path:")[0].split()) or type(error).__name__
