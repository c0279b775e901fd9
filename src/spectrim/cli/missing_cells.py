"""Leave out of a grid the cells that are done, before a launcher starts a process or queues a job for each of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig

from spectrim.cli import progress, tracking
from spectrim.cli.messages import LOG
from spectrim.records import records
from spectrim.runs import cells, configuration
from spectrim.runs.read_once import read_once

Batches = list[list[list[str]]]  # of cells, each of them a list of overrides


@contextmanager
def alone(is_cell_done: Callable[[DictConfig], bool]) -> Iterator[None]:
    """Let Hydra's own sweeper launch the missing cells alone while the block runs. Others search, and need them all.

    ``is_cell_done``: tells from the configuration of a cell whether it is done.
    """
    usual = Plugins.instantiate_sweeper

    def instantiate(self: Plugins, **given: Any) -> Sweeper:
        sweeper: Any = usual(self, **given)
        if type(sweeper).__name__ == "BasicSweeper":  # Hydra loads plugins anew, so the class is not the imported one.
            _leave_out(sweeper, is_cell_done)
        return sweeper

    Plugins.instantiate_sweeper = instantiate  # type: ignore[method-assign]
    try:
        yield
    finally:
        Plugins.instantiate_sweeper = usual  # type: ignore[method-assign]


def _leave_out(sweeper: Any, is_cell_done: Callable[[DictConfig], bool]) -> None:
    """Let a sweeper compose every cell as soon as it knows them, and forget those that are done."""
    split = sweeper.split_arguments

    def missing(overrides: list[Override], batch_size: int | None) -> Batches:
        batches: Batches = split(overrides, batch_size)
        loader = sweeper.hydra_context.config_loader
        composed = partial(loader.load_sweep_config, sweeper.config)
        with read_once(loader):
            left = [[cell for cell in batch if not _done(composed(cell), is_cell_done)] for batch in batches]
        total, done = sum(map(len, batches)), sum(map(len, batches)) - sum(map(len, left))
        progress.begin(done)
        if done:
            LOG.info("%d of %d cells are done already", done, total)
        return [batch for batch in left if batch]  # A launcher of jobs refuses an empty one.

    sweeper.split_arguments = missing
    # Each cell was composed, so Hydra need not do it once more.
    sweeper.validate_batch_is_legal = lambda batch: LOG.debug("%d cells are launched", len(batch))


def _done(cfg: DictConfig, is_cell_done: Callable[[DictConfig], bool]) -> bool:
    running = HydraConfig.instance()
    before = running.cfg
    try:
        running.set_config(cfg)  # interpolations such as ${hydra:runtime.choices.model} look there
        return is_cell_done(cfg)
    except Exception:  # Whatever is wrong with the cell or with its record, its run tells it.
        return False
    finally:
        running.cfg = before


def has_record(cfg: DictConfig) -> bool:
    """Return whether a run would do nothing: it is recorded, its tracker was told, and no state of it is left.

    Raises ``UserError`` or an error of OmegaConf where the settings or the record are damaged.
    """
    cell = cells.cell((), cfg)
    if cell.signature is None or cfg.returns is not None:  # The record may lack what a search asks for.
        return False
    path = records.path_of(Path(cfg.records), cell.experiment, cell.signature)
    state = records.state_path(Path(cfg.unfinished), cell.signature)
    if not path.exists() or state.exists():
        return False
    records.read_own(path)
    return tracking.was_told(configuration.plain(cfg.tracking), path)


def has_checkpoint(cfg: DictConfig) -> bool:
    """Return whether a training would do nothing: its checkpoint is there, and its tracker was told."""
    path = Path(cfg.checkpoint)
    state = records.state_path(Path(cfg.unfinished), path.stem)
    return path.is_file() and not state.exists() and tracking.was_told(configuration.plain(cfg.tracking), path)
