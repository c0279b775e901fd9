"""The commands ``spectrim`` and ``spectrim-train``. They import torch inside a job, so that help comes quickly."""

import hydra
from omegaconf import DictConfig

from spectrim.cli import grid, usage
from spectrim.runs.configuration import CONF


@hydra.main(version_base="1.3", config_path=CONF, config_name="config")
def _compress(cfg: DictConfig) -> float | None:
    with grid.cell("spectrim"):
        from spectrim.cli import run

        return run.returned(run.run(cfg), cfg.returns)
    return None  # another process computes the run


@hydra.main(version_base="1.3", config_path=CONF, config_name="train")
def _train(cfg: DictConfig) -> None:
    with grid.cell("spectrim-train"):
        from spectrim.cli import train

        train.train(cfg)


def compress() -> None:
    """Run the command ``spectrim``."""
    usage.print_if_asked("spectrim")
    grid.command_line(_compress)


def train() -> None:
    """Run the command ``spectrim-train``."""
    usage.print_if_asked("spectrim-train")
    grid.command_line(_train)
