"""The command line: compose a configuration, build, compress, measure, record. One run is one record."""

import json
import os
import sys
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import hydra
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import nn

from spectrim import config, records, surgery
from spectrim.algorithms.base import Compressed
from spectrim.errors import UserError
from spectrim.objective import Evaluation, Objective
from spectrim.phases import Phases
from spectrim.provenance import file_digest, provenance

SCIENTIFIC = ("model", "data", "shape", "decomposer", "algorithm", "seed")


def run(cfg: DictConfig) -> dict[str, Any]:
    """One run: the record on disk if it is there already, else made, written and returned."""
    settings = {key: config.plain(cfg[key]) if isinstance(cfg[key], DictConfig) else cfg[key] for key in SCIENTIFIC}
    config.check_targets(settings)
    checkpoint = _checkpoint(cfg)
    settings["checkpoint"] = None if checkpoint is None else file_digest(checkpoint)
    signature = records.signature(settings)
    path = records.path_of(Path(cfg.records), cfg.name, signature)
    if path.exists():
        print(f"{cfg.name} {signature}: already recorded", file=sys.stderr)
        return records.read(path)

    algorithm, decomposer = config.build(settings["algorithm"]), config.build(settings["decomposer"])
    tracker = config.build(config.plain(cfg.tracking))
    phases = Phases()
    with phases.measure("load"):
        subject = _subject(json.dumps({key: settings[key] for key in ("model", "data", "shape", "seed")}), checkpoint)
    with phases.measure("select"):
        compressed = algorithm.compress(subject.model, decomposer, subject.objective)
    with phases.measure("evaluate"):
        outcome = subject.outcome(compressed)
    record = {
        "schema": records.SCHEMA,
        "signature": signature,
        "experiment": cfg.name,
        "names": config.plain(cfg.names),
        "config": settings,
        "seed": cfg.seed,
        "calibration_seed": settings["data"].get("calibration_seed", 0),
        **outcome,
        "phases": dict(phases),
        "provenance": provenance(config.invocation(), subject.data_digest, checkpoint),
    }
    records.write(Path(cfg.records), record)
    _track(tracker, record, compressed)
    _say(record)
    return record


@dataclass(eq=False)
class Subject:
    """A trained model with its data: what many runs of a grid share. Nothing of it is computed twice."""

    model: nn.Module
    objective: Objective
    test: Objective
    data_digest: str
    dense: dict[str, Any] = field(default_factory=dict)

    def outcome(self, compressed: Compressed) -> dict[str, Any]:
        """Everything measured about a compressed model, beside the same of the dense one."""
        if not self.dense:
            self.dense = self._measure(self.model, compressed.dense_cost)
        layers = json.loads(compressed.report.to_json(orient="records", double_precision=15))
        return {
            "dense": self.dense,
            "compressed": self._measure(compressed.model, compressed.cost) if compressed.plan else self.dense,
            "predicted_change": compressed.predicted_change,
            "plan": compressed.plan.as_dict(),
            "layers": layers,
            "log": compressed.log,
            "notes": compressed.notes,
        }

    def _measure(self, model: nn.Module, cost: tuple[int, int]) -> dict[str, Any]:
        return {
            "params": cost[0],
            "macs": cost[1],
            "calibration": _plain(self.objective.evaluate(model)),
            "test": _plain(self.test.evaluate(model, "test")),
        }


@lru_cache(maxsize=1)
def _subject(settings_json: str, checkpoint: Path | None) -> Subject:
    settings = json.loads(settings_json)
    splits = config.build(settings["data"]).load()
    torch.manual_seed(settings["seed"])
    model = config.build(settings["model"])
    if checkpoint is not None:
        surgery.load(checkpoint, model)
    model = model.eval().to(memory_format=torch.channels_last)
    seen = Objective(F.cross_entropy, {"calibration": splits.calibration, "train": splits.train})
    return Subject(model, seen, Objective(F.cross_entropy, {"test": splits.test}), splits.digest)


def _checkpoint(cfg: DictConfig) -> Path | None:
    if cfg.checkpoint is None:
        return None
    path = Path(cfg.checkpoint)
    if not path.is_file():
        make = f"spectrim-train model={cfg.names.model} data={cfg.names.data} seed={cfg.seed}"
        raise UserError(f"there is no checkpoint at {path}; make it with: {make}")
    return path


def _plain(evaluation: Evaluation) -> dict[str, Any]:
    return evaluation._asdict()


def _track(tracker: Any, record: dict[str, Any], compressed: Compressed) -> None:
    names, dense, small = record["names"], record["dense"], record["compressed"]
    metrics = {
        "params_kept": small["params"] / dense["params"],
        "macs_kept": small["macs"] / dense["macs"],
        "test_loss": small["test"]["loss"],
        "test_loss_change": small["test"]["loss"] - dense["test"]["loss"],
        "test_accuracy": small["test"]["accuracy"],
        "predicted_change": record["predicted_change"],
    }
    with tracker.run(record["signature"], record["experiment"], names["algorithm"], record["config"]) as run:
        run.table("layers", compressed.report.astype({"shape": str}))
        for step, entry in enumerate(record["log"]):
            run.log({key: value for key, value in entry.items() if isinstance(value, int | float)}, step)
        run.summary({key: value for key, value in metrics.items() if value is not None})


def _say(record: dict[str, Any]) -> None:
    names, dense, small = record["names"], record["dense"], record["compressed"]
    print(
        f"{names['model']}/{names['data']} {names['algorithm']}: "
        f"params kept {100 * small['params'] / dense['params']:.1f} %, MACs {100 * small['macs'] / dense['macs']:.1f} %; "
        f"test loss {dense['test']['loss']:.4f} -> {small['test']['loss']:.4f}, "
        f"top-1 {_percent(dense)} -> {_percent(small)} %"
    )


def _percent(measured: dict[str, Any]) -> str:
    accuracy = measured["test"]["accuracy"]
    return "n/a" if accuracy is None else f"{100 * accuracy:.2f}"


@hydra.main(version_base="1.3", config_path=config.CONF, config_name="config")
def _job(cfg: DictConfig) -> None:
    run(cfg)


def main() -> None:
    """Entry of ``spectrim``."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to us, to be said in one line
    config.command_line(_job)


if __name__ == "__main__":
    main()
