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

from spectrim import batchnorm, config, records, surgery
from spectrim.algorithms.base import Compressed
from spectrim.errors import UserError
from spectrim.objective import Objective
from spectrim.phases import Phases
from spectrim.provenance import file_digest, provenance

# A checkpoint and the digest of its content: another file in its place is another net, not the remembered one.
Weights = tuple[Path, str] | None
SEEN = ("calibration", "verification", "train")  # the splits that a selector may use
SCIENTIFIC = ("model", "data", "shape", "decomposer", "algorithm", "seed")


def run(cfg: DictConfig) -> dict[str, Any]:
    """One run: the record on disk if it is there already, else made, written and returned."""
    settings = scientific(cfg)
    checkpoint = _checkpoint(cfg)
    settings["checkpoint"] = None if checkpoint is None else file_digest(checkpoint)
    signature = records.signature(settings)
    path = records.path_of(Path(cfg.records), cfg.name, signature)
    if path.exists():
        print(f"{cfg.name} {signature}: already recorded", file=sys.stderr)
        return records.read(path)

    state = Path(cfg.unfinished) / f"{signature}.state.safetensors"
    algorithm, decomposer = _algorithm(settings["algorithm"], state), config.build(settings["decomposer"])
    tracker = config.build(config.plain(cfg.tracking))
    phases = Phases()
    with phases.measure("load"):
        weights = None if checkpoint is None else (checkpoint, settings["checkpoint"])
        subject = _subject(json.dumps(settings["model"]), cfg.seed, weights, json.dumps(settings["data"]))
    with phases.measure("select"):
        compressed = algorithm.compress(subject.model, decomposer, subject.objective)
        compressed.settle(cfg.batch_norm, subject.objective)
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
        "provenance": provenance(config.invocation("spectrim"), subject.data_digest, checkpoint),
    }
    records.write(Path(cfg.records), record)
    state.unlink(missing_ok=True)
    _track(tracker, record, compressed)
    _say(record)
    return record


def _algorithm(settings: dict[str, Any], state: Path) -> Any:
    """The selector; one that trains is told where to keep what it needs to go on after a kill."""
    keeps = "state" in settings and settings["state"] is None
    return config.build({**settings, "state": str(state)} if keeps else settings)


def scientific(cfg: DictConfig) -> dict[str, Any]:
    """What a run is signed by, with the digest of its checkpoint. Raises ``UserError`` for what it may not hold."""
    settings = {key: config.plain(cfg[key]) if isinstance(cfg[key], DictConfig) else cfg[key] for key in SCIENTIFIC}
    config.check_targets(settings)
    config.check_seed(cfg)
    batchnorm.require(cfg.batch_norm)
    if cfg.batch_norm != "keep":  # younger than many a record: where it is not mentioned, it is this
        settings["batch_norm"] = cfg.batch_norm
    return settings


@dataclass(eq=False)
class Subject:
    """A trained model and the splits it is judged on: what many runs of a grid share. Nothing is computed twice."""

    model: nn.Module
    objective: Objective
    test: Objective
    data_digest: str
    dense: dict[str, dict[str, Any]] = field(default_factory=dict)

    def outcome(self, compressed: Compressed) -> dict[str, Any]:
        """Everything measured about a compressed model, beside the same of the dense one."""
        for split, objective in (("calibration", self.objective), ("test", self.test)):
            if split not in self.dense:
                self.dense[split] = objective.evaluate(self.model, split)._asdict()
        dense = {**compressed.dense_cost._asdict(), **self.dense}
        small = dense
        if compressed.plan:
            small = {
                **compressed.cost._asdict(),
                "calibration": self.objective.evaluate(compressed.model)._asdict(),
                "test": self.test.evaluate(compressed.model, "test")._asdict(),
            }
        return {
            "dense": dense,
            "compressed": small,
            "predicted_change": compressed.predicted_change,
            "plan": compressed.plan.as_dict(),
            "layers": json.loads(compressed.report.to_json(orient="records", double_precision=15)),
            "log": compressed.log,
            "notes": compressed.notes,
        }


@lru_cache(maxsize=1)
def _subject(model_json: str, seed: int, weights: Weights, data_json: str) -> Subject:
    splits = config.build(json.loads(data_json)).load()
    model, dense_on_test = _model(model_json, seed, weights)
    seen = Objective(F.cross_entropy, {name: getattr(splits, name) for name in SEEN})
    test = Objective(F.cross_entropy, {"test": splits.test})
    key = splits.test.digest()
    if key not in dense_on_test:
        dense_on_test[key] = test.evaluate(model, "test")._asdict()
    return Subject(model, seen, test, splits.digest, {"test": dense_on_test[key]})


@lru_cache(maxsize=1)
def _model(model_json: str, seed: int, weights: Weights) -> tuple[nn.Module, dict[str, dict[str, Any]]]:
    """The dense model, and its evaluation on each test split it has met: neither depends on the calibration set."""
    torch.manual_seed(seed)
    model = config.build(json.loads(model_json))
    if weights is not None:
        surgery.load(weights[0], model)
    return model.eval().to(memory_format=torch.channels_last), {}


def _checkpoint(cfg: DictConfig) -> Path | None:
    if cfg.checkpoint is None:
        return None
    path = Path(cfg.checkpoint)
    if not path.is_file():
        make = f"spectrim-train model={cfg.names.model} data={cfg.names.data} seed={cfg.seed}"
        raise UserError(f"there is no checkpoint at {path}; make it with: {make}")
    return path


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
            run.log(entry, step)
        run.summary({key: value for key, value in metrics.items() if value is not None})


def _say(record: dict[str, Any]) -> None:
    names, dense, small = record["names"], record["dense"], record["compressed"]
    params, macs = small["params"] / dense["params"], small["macs"] / dense["macs"]
    print(
        f"{names['model']}/{names['data']} {names['algorithm']}: "
        f"params kept {100 * params:.1f} %, MACs {100 * macs:.1f} %; "
        f"test loss {dense['test']['loss']:.4f} -> {small['test']['loss']:.4f}, "
        f"top-1 {_percent(dense)} -> {_percent(small)} %"
    )


def _percent(measured: dict[str, Any]) -> str:
    accuracy = measured["test"]["accuracy"]
    return "n/a" if accuracy is None else f"{100 * accuracy:.2f}"


@hydra.main(version_base="1.3", config_path=config.CONF, config_name="config")
def _job(cfg: DictConfig) -> None:
    with config.cell("spectrim"):
        run(cfg)


def main() -> None:
    """Entry of ``spectrim``."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to us, to be said in one line
    config.command_line(_job)


if __name__ == "__main__":
    # Not by the names of __main__, which the processes of joblib cannot look up.
    from spectrim.run import main as entry

    entry()
