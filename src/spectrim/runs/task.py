"""The task that many runs of a grid share: a trained model and the splits it is judged on."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.measurement import Readings
from spectrim.checkpoints import single_file
from spectrim.runs import targets
from spectrim.statistics import agreement, paired_loss
from spectrim.statistics.objective import Objective
from spectrim.statistics.remembered import MEASUREMENTS
from spectrim.surgery.cost import Cost, model_cost
from spectrim.tools.memo import Memory

# A checkpoint and the digest of its content. The digest tells a replaced file from the one that is cached.
Weights = tuple[Path, str] | None
Settings = dict[str, Any]  # of a class, by its ``_target_``
Numbers = dict[str, Any]  # what one model measures on one split
SPLITS = ("calibration", "verification", "train")  # the splits that an algorithm may use


@dataclass(eq=False)
class Task:
    """A model and its data.

    ``objective``: the splits that an algorithm may see.
    ``test``: the test split, which no algorithm sees.
    ``data_digest``: the digest of all splits.
    ``description``: a line on the data for the notes of a record; may be empty.
    ``also``: the test splits of other data sets, by name.
    ``agreement``: the test splits on which predictions are compared with those of the dense model, by name.
    ``paired``: whether to record the loss of each test sample.
    ``dense``: what the dense model measures, by split; filled as it is needed.
    """

    model: nn.Module
    objective: Objective
    test: Objective
    data_digest: str
    description: str
    also: dict[str, Objective] = field(default_factory=dict)
    agreement: dict[str, Objective] = field(default_factory=dict)
    paired: bool = False
    dense: dict[str, Numbers] = field(default_factory=dict)

    def outcome(self, compressed: Compressed) -> dict[str, Any]:
        """Measure a compressed model and the dense one alike, and return that part of a record."""
        dense = self._dense_numbers()
        small = dense
        if not _same(compressed.model, self.model):
            elsewhere = {name: _on_test(one, compressed.model) for name, one in self.also.items()}
            small = {
                **compressed.cost._asdict(),
                "calibration": self.objective.evaluate(compressed.model)._asdict(),
                "test": _on_test(self.test, compressed.model),
                **({"also": elsewhere} if elsewhere else {}),
            }
        return {
            "dense": dense,
            "compressed": small,
            "predicted_change": compressed.predicted_change,
            "plan": compressed.plan.as_dict(),
            "layers": json.loads(compressed.report.to_json(orient="records", double_precision=15)),
            "log": compressed.log,
            "notes": self._notes(compressed.notes),
            **self._beside_dense(compressed.model),
        }

    def readings(self, readings: Readings) -> dict[str, Any]:
        """Return the same part of the record of a measurement, whose model is the dense one."""
        dense = self._dense_numbers()
        return {
            "dense": dense,
            "compressed": dense,
            "predicted_change": 0.0,
            "plan": {},
            "layers": [],
            "log": readings.rows,
            "notes": self._notes(readings.notes),
        }

    def verification(self, found: Compressed | Readings) -> Numbers:
        """Return what the compressed model measures on the verification split, for a search."""
        model = found.model if isinstance(found, Compressed) else self.model
        return self.objective.evaluate(model, "verification")._asdict()

    def _beside_dense(self, model: nn.Module) -> dict[str, Any]:
        """Compare a model with the dense one sample by sample, as far as the run asks for it."""
        found: dict[str, Any] = {}
        if self.paired:
            found["test_losses"] = {"dense": self._dense_losses, "compressed": _losses(self.test, model)}
        if self.agreement:
            found["agreement"] = {
                name: agreement.agreement(
                    self._dense_answers[name], agreement.log_probabilities(one, model, "test")
                )._asdict()
                for name, one in self.agreement.items()
            }
        return found

    @cached_property
    def _dense_losses(self) -> list[float]:
        return _losses(self.test, self.model)

    @cached_property
    def _dense_answers(self) -> dict[str, Tensor]:
        return {name: agreement.log_probabilities(one, self.model, "test") for name, one in self.agreement.items()}

    @cached_property
    def _dense_cost(self) -> Cost:
        example = self.objective.example()
        assert example is not None  # every task has a calibration split
        return model_cost(self.model, example)

    def _dense_numbers(self) -> dict[str, Any]:
        if "calibration" not in self.dense:
            self.dense["calibration"] = self.objective.evaluate(self.model)._asdict()
        return {**self._dense_cost._asdict(), **self.dense}

    def _notes(self, notes: list[str]) -> list[str]:
        return [self.description, *notes] if self.description else notes


def _on_test(objective: Objective, model: nn.Module) -> Numbers:
    return objective.evaluate(model, "test")._asdict()


def _losses(objective: Objective, model: nn.Module) -> list[float]:
    return paired_loss.losses(objective, model, "test", by_batch=False).values.tolist()


def _same(first: nn.Module, second: nn.Module) -> bool:
    """Return whether two models have equal layers, parameters and buffers, to the last bit."""
    ours, theirs = ([(name, type(module)) for name, module in model.named_modules()] for model in (first, second))
    mine, other = first.state_dict(), second.state_dict()
    return ours == theirs and mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


def load(
    model: Settings,
    seed: int,
    weights: Weights,
    data: Settings,
    also: Mapping[str, Settings],
    device: torch.device,
    layers_at_once: int | None = None,
    agreement: Mapping[str, Settings] | None = None,
    paired: bool = False,
) -> Task:
    """Build the model on ``device`` and load its splits. Equal arguments return the task of the last call.

    ``seed``: seed of the initial weights.
    ``weights``: the checkpoint to load; None leaves the initial weights.
    ``also``: other data sets whose test splits are measured too, by name.
    ``layers_at_once``: see ``Objective``.
    ``agreement``: other data sets on whose test splits predictions are compared with the dense model's, by name.
    ``paired``: whether to record the loss of each test sample.
    """
    others, beside = json.dumps(also), json.dumps(agreement or {})
    return _cached(json.dumps(model), seed, weights, json.dumps(data), others, device, layers_at_once, beside, paired)


@lru_cache(maxsize=1)
def _cached(
    model_json: str,
    seed: int,
    weights: Weights,
    data_json: str,
    also_json: str,
    device: torch.device,
    layers_at_once: int | None,
    agreement_json: str,
    paired: bool,
) -> Task:
    splits = targets.build(json.loads(data_json), "load").load()
    others, beside = _loaded(also_json), _loaded(agreement_json)
    model, dense_on_test = _model(model_json, seed, weights, device)

    def dense(splits: Any, objective: Objective) -> Numbers:
        key = splits.test.digest()
        if key not in dense_on_test:
            dense_on_test[key] = _on_test(objective, model)
        return dense_on_test[key]

    memory = Memory(whitened=1, gates=8, **MEASUREMENTS)  # the budgets of a grid share the gates of joint selection
    seen = Objective(splits.loss, {name: getattr(splits, name) for name in SPLITS}, layers_at_once, memory)
    test = Objective(splits.loss, {"test": splits.test})
    also, compared = (
        {name: Objective(other.loss, {"test": other.test}) for name, other in loaded.items()}
        for loaded in (others, beside)
    )
    found: dict[str, Numbers] = {"test": dense(splits, test)}
    if also:
        found["also"] = {name: dense(others[name], objective) for name, objective in also.items()}
    said = [
        splits.description,
        *(f"also measured: {other.description or name}" for name, other in others.items()),
        *(f"agreement measured: {other.description or name}" for name, other in beside.items()),
    ]
    digest = splits.digest
    if also or compared:
        tests = "".join(other.test.digest() for other in (*others.values(), *beside.values()))
        digest = hashlib.sha256((digest + tests).encode()).hexdigest()
    return Task(model, seen, test, digest, "; ".join(filter(None, said)), also, compared, paired, found)


def _loaded(data_json: str) -> dict[str, Any]:
    """Return the splits of several data sets by name."""
    return {name: targets.build(node, "load").load() for name, node in json.loads(data_json).items()}


@lru_cache(maxsize=1)
def _model(model_json: str, seed: int, weights: Weights, device: torch.device) -> tuple[nn.Module, dict[str, Numbers]]:
    """Build the dense model. Its evaluations on test splits are cached beside it."""
    torch.manual_seed(seed)
    model = targets.build(json.loads(model_json), "forward")
    if weights is not None:
        single_file.load(weights[0], model)
    return model.eval().to(device, memory_format=torch.channels_last), {}
