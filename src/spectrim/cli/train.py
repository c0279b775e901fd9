"""The training entry: one model on one data set, its checkpoint and, beside it, the record of its training."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from spectrim.checkpoints import single_file
from spectrim.cli import progress, run_lock, tracked_values
from spectrim.cli.messages import LOG, RESULTS
from spectrim.cli.tracking import Follower
from spectrim.data.images import ImageSplit, Splits
from spectrim.data.text import TextSplit, TextSplits
from spectrim.errors import UserError
from spectrim.factored.plan import RankPlan
from spectrim.records import records
from spectrim.records.provenance import provenance
from spectrim.runs import configuration, targets
from spectrim.statistics.objective import Objective
from spectrim.tools import files
from spectrim.tools.device import device_called
from spectrim.tools.settings import require_seed
from spectrim.training.fit import Training, fit
from spectrim.training.recipe import Recipe
from spectrim.training.saved_state import StateFile


def train(cfg: DictConfig) -> Path:
    """Train as configured and return the path of the checkpoint. An interrupted training goes on where it stopped.

    A checkpoint that exists is left alone: remove it to train anew.
    """
    path, unfinished = Path(configuration.text(cfg, "checkpoint")), Path(configuration.text(cfg, "unfinished"))
    state = records.state_path(unfinished, path.stem)
    settings = {key: configuration.plain(cfg[key]) for key in ("model", "data", "shape", "recipe")}
    targets.check_targets(settings)
    require_seed("seed", cfg.seed)
    follower = _follower(cfg, settings, path)
    if path.is_file():
        files.discard(state)  # left by a kill right after the checkpoint was written
        return _there(path, follower)
    dtype, device = _dtype(cfg.stored_as), device_called(cfg.device)  # refused now rather than after the training
    if cfg.threads is not None and (type(cfg.threads) is not int or cfg.threads < 1):
        raise UserError(f"threads={cfg.threads!r} is not a whole number of at least 1, or null")
    files.require_writable(path)  # first, for a folder such as "." has no name to give another ending
    files.require_writable(path.with_suffix(".json"), state)
    with run_lock.locked(path, wait=not progress.in_grid()):
        if path.is_file():  # Another process made it while this one waited.
            return _there(path, follower)
        with follower.following():
            record = _trained(cfg, settings, path, state, dtype, device)
    progress.finished(computed=True)
    accuracy = record["test"]["accuracy"]
    top = f"top-1 {100 * accuracy:.2f} %, " if accuracy is not None else ""
    RESULTS.info("%s%s: test %sloss %.4f", progress.said(), path, top, record["test"]["loss"])
    follower.deliver(lambda: tracked_values.of_training(record))
    return path


def _there(path: Path, follower: Follower) -> Path:
    LOG.info("%s exists already", path)
    progress.finished(computed=False)
    described = path.with_suffix(".json")
    if described.is_file():  # A checkpoint from elsewhere has no record.
        follower.deliver(lambda: tracked_values.of_training(files.read_json(described)))
    return path


def _follower(cfg: DictConfig, settings: dict[str, Any], path: Path) -> Follower:
    """Return what tells the tracker of the training. Its signature is that of settings and seed."""
    config = {**records.identity(settings), "seed": cfg.seed}
    group, signature = path.parent.name, records.signature(config)
    about = partial(tracked_values.about, configuration.plain(cfg.names), group, signature, config)
    return Follower(configuration.plain(cfg.tracking), about, path)


def _trained(
    cfg: DictConfig, settings: dict[str, Any], path: Path, state: Path, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Train, write the checkpoint and its record, and return the record."""
    recipe: Recipe = targets.build(settings["recipe"], "learning_rate")
    splits: Splits | TextSplits = targets.build(settings["data"], "load").load()
    if not isinstance(splits.train, ImageSplit | TextSplit):
        raise UserError(f"training needs images held in memory; {cfg.names.data} is read from a folder")
    torch.manual_seed(cfg.seed)
    model = targets.build(settings["model"], "forward").to(device)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    try:
        curve = fit(model, splits.train, Training(recipe, cfg.seed, splits.loss), state=StateFile(state))
    except FloatingPointError as error:
        raise UserError(f"{error}; the last good state is {state}") from error
    record = _record(cfg, settings, model, splits, curve)
    # The record first: a checkpoint that is there is taken for finished.
    files.write({path.with_suffix(".json"): (json.dumps(record, indent=1) + "\n").encode()})
    single_file.save(path, model, RankPlan(), {"model": cfg.names.model, "data": cfg.names.data}, dtype)
    files.discard(state)
    return record


def _record(
    cfg: DictConfig, settings: dict[str, Any], model: nn.Module, splits: Splits | TextSplits, curve: list[dict]
) -> dict[str, Any]:
    """Return the record that lies beside the checkpoint: the settings, the course of the training, and its result."""
    judge = Objective(splits.loss, {"calibration": splits.calibration, "test": splits.test})
    return {
        "config": {**records.identity(settings), "seed": cfg.seed},
        "names": configuration.plain(cfg.names),
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "calibration": judge.evaluate(model, "calibration")._asdict(),
        "test": judge.evaluate(model, "test")._asdict(),
        "seconds": round(sum(point["seconds"] for point in curve), 1),
        "stored_as": cfg.stored_as,
        "curve": curve,
        "provenance": provenance(configuration.invocation("spectrim-train"), splits.digest, None, cfg.device),
    }


def _dtype(name: str) -> torch.dtype:
    if name not in ("float32", "float16"):
        raise UserError(f"stored_as is float32 or float16, got {name}")
    return getattr(torch, name)


if __name__ == "__main__":
    from spectrim.cli import commands

    commands.train()
