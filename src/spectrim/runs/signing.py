"""What a run is signed by: the settings that can change its result."""

from typing import Any

from omegaconf import DictConfig

from spectrim.errors import UserError
from spectrim.runs import configuration, targets

SCIENTIFIC = ("model", "data", "shape", "decomposer", "algorithm", "seed")


def scientific(cfg: DictConfig) -> dict[str, Any]:
    """Return what a run is signed by, without the digest of its checkpoint.

    Raises ``UserError`` where it names a class that is not allowed, or where a seed is not one.
    """
    settings = {
        key: configuration.plain(cfg[key]) if isinstance(cfg[key], DictConfig) else cfg[key] for key in SCIENTIFIC
    }
    targets.check_targets(settings)
    configuration.check_seed(cfg)
    return settings | {"batch_norm": cfg.batch_norm, "also": _also(cfg.also) if cfg.also else {}}


def _also(nodes: Any) -> dict[str, Any]:
    """Return the settings of each data set whose test split is measured too, by its name."""
    given: Any = configuration.plain(nodes) if isinstance(nodes, DictConfig) else {"": None}
    for name, node in given.items():
        if not isinstance(node, dict) or not isinstance(node.get("data"), dict):
            raise UserError(f"also.{name} is no data set; name one as +data@also.NAME=sotu")
    return {name: node["data"] for name, node in given.items()}
