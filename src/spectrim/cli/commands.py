"""The commands ``spectrim`` and ``spectrim-train``. They import torch inside a job, so that help comes quickly."""

import hydra
from omegaconf import DictConfig

from spectrim.cli import command_line, missing_cells, usage
from spectrim.runs.configuration import CONF


@hydra.main(version_base="1.3", config_path=CONF, config_name="config")
def _compress(cfg: DictConfig) -> float | None:
    with command_line.cell("spectrim"):
        from spectrim.cli import run

        return run.returned(run.run(cfg), cfg.returns)
    return None  # another process computes the run


@hydra.main(version_base="1.3", config_path=CONF, config_name="train")
def _train(cfg: DictConfig) -> None:
    with command_line.cell("spectrim-train"):
        from spectrim.cli import train

        train.train(cfg)


def compress() -> None:
    """Run the command ``spectrim``."""
    usage.print_if_asked("spectrim")
    command_line.run(_compress, missing_cells.has_record)


def train() -> None:
    """Run the command ``spectrim-train``."""
    usage.print_if_asked("spectrim-train")
    command_line.run(_train, missing_cells.has_checkpoint)
