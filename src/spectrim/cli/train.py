"""The training entry: one model on one data set, its checkpoint and, beside it, the record of its training."""

import json
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from torch import nn

from spectrim.checkpoints import single_file
from spectrim.cli import grid
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
    """Train as configured, going on from an interrupted training; returns the checkpoint's path.

    A checkpoint that exists is left alone: remove it to train anew.
    """
    path, unfinished = Path(configuration.text(cfg, "checkpoint")), Path(configuration.text(cfg, "unfinished"))
    state = unfinished / f"{path.stem}.state.safetensors"
    if path.is_file():
        state.unlink(missing_ok=True)  # left by a kill right after the checkpoint was written
        print(f"{path} exists already")
        return path
    settings = {key: configuration.plain(cfg[key]) for key in ("model", "data", "shape", "recipe")}
    targets.check_targets(settings)
    require_seed("seed", cfg.seed)
    dtype, device = _dtype(cfg.stored_as), device_called(cfg.device)  # refused now rather than after the training
    if cfg.threads is not None and (type(cfg.threads) is not int or cfg.threads < 1):
        raise UserError(f"threads={cfg.threads!r} is not a whole number of at least 1, or null")
    beside = path.with_suffix(".json")
    files.require_writable(path, beside, state)
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
    files.write({beside: (json.dumps(record, indent=1) + "\n").encode()})
    single_file.save(path, model, RankPlan(), {"model": cfg.names.model, "data": cfg.names.data}, dtype)
    state.unlink(missing_ok=True)
    accuracy = record["test"]["accuracy"]
    print(f"{path}: test top-1 {100 * accuracy:.2f} %, " if accuracy is not None else f"{path}: test ", end="")
    print(f"loss {record['test']['loss']:.4f}")
    return path


def _record(
    cfg: DictConfig, settings: dict[str, Any], model: nn.Module, splits: Splits | TextSplits, curve: list[dict]
) -> dict[str, Any]:
    """What lies beside the checkpoint: how the net was trained, how that went, and what it reached."""
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


@hydra.main(version_base="1.3", config_path=configuration.CONF, config_name="train")
def _job(cfg: DictConfig) -> None:
    with grid.cell("spectrim-train"):
        train(cfg)


def main() -> None:
    """Entry of ``spectrim-train``."""
    grid.command_line(_job)


if __name__ == "__main__":
    # Not by the names of __main__, which the processes of joblib cannot look up.
    from spectrim.cli.train import main as entry

    entry()
