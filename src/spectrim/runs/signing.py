"""What a run is signed by: the settings that can change its result."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from spectrim.errors import UserError
from spectrim.records import records
from spectrim.runs import configuration, targets
from spectrim.tools import digests
from spectrim.tools.settings import require_seed

SCIENTIFIC = ("model", "data", "shape", "decomposer", "algorithm", "seed")


def scientific(cfg: DictConfig) -> dict[str, Any]:
    """Return what a run is signed by, without the digest of its checkpoint.

    Raises ``UserError`` where it names a class that is not allowed, or where a seed is not one.
    """
    settings = {
        key: configuration.plain(cfg[key]) if isinstance(cfg[key], DictConfig) else cfg[key] for key in SCIENTIFIC
    }
    targets.check_targets(settings)
    require_seed("seed", cfg.seed)
    if not isinstance(cfg.paired, bool):
        raise UserError(f"paired must be true or false, got {cfg.paired}")
    others = {name: _others(name, cfg[name]) if cfg[name] else {} for name in ("also", "agreement")}
    return settings | {"batch_norm": cfg.batch_norm, **others, "paired": cfg.paired}


def signed(
    settings: dict[str, Any], checkpoint: Path | None, digest_of: Callable[[Path], str] = digests.of_file
) -> tuple[dict[str, Any], str]:
    """Return the settings with the digest of the checkpoint, and the signature of the run.

    ``settings``: those of ``scientific``.
    ``checkpoint``: the file that the run starts from; None where it starts untrained.
    """
    settings = settings | {"checkpoint": None if checkpoint is None else digest_of(checkpoint)}
    return settings, records.signature(records.identity(settings))


def _others(setting: str, nodes: Any) -> dict[str, Any]:
    """Return the settings of each data set in ``also`` or ``agreement``, by its name."""
    given: Any = configuration.plain(nodes) if isinstance(nodes, DictConfig) else {"": None}
    for name, node in given.items():
        if not isinstance(node, dict) or not isinstance(node.get("data"), dict):
            raise UserError(f"{setting}.{name} is no data set; name one as +data@{setting}.NAME=sotu")
    return {name: node["data"] for name, node in given.items()}
