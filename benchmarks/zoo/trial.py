"""Try one architecture: compress it in three ways, load it back, and export it. Each try ends in one word."""

import copy
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from given import Architecture, Given
from torch import Tensor, nn

import spectrim
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.batches import pairs
from spectrim.errors import UserError, first_line
from spectrim.export.same_outputs import outputs_of, require_same
from spectrim.surgery.cost import parameters
from spectrim.tools.hooks import hooked

KEPT = 0.8  # of the parameters
SAMPLES = 8  # for the gates and for the refit
# The words of a cell. WRONG and CRASHES are faults of spectrim; LEFT is an answer of an algorithm.
WORKS, LEFT, REFUSED, WRONG, CRASHES, ABSENT = "works", "dense", "refused", "wrong", "crashes", "not installed"
FAULTS = (WRONG, CRASHES)
SELECTORS: dict[str, Callable[[], Any]] = {
    "truncation": lambda: spectrim.Truncation(params_kept=KEPT),
    "joint": lambda: spectrim.Joint(params_kept=KEPT, samples=SAMPLES, refit=SAMPLES),
    "compact": spectrim.Compact,
}
FORMS = ("loads", "pt2", "onnx")
PREFERRED = ("joint", "truncation", "compact")  # whose result is written


@dataclass
class Row:
    """The outcome for one architecture. ``cells``: a word for each try; ``reasons``: why it is not ``works``.

    ``dense_share``: part of the parameters in matrices that stay dense because no layer of theirs can be factored.
    """

    package: str
    name: str
    params: int = 0
    dense_share: float = float("nan")
    cells: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def note(self, trial: str, word: str, reason: object = "") -> None:
        """Write down how a try ended."""
        self.cells[trial] = word
        if reason:
            self.reasons[trial] = first_line(reason) if isinstance(reason, BaseException) else str(reason)

    def failed(self, trial: str, error: Exception) -> None:
        """Write down a refusal in one line, or else a crash."""
        if isinstance(error, UserError):
            self.note(trial, REFUSED, error)
        else:
            self.note(trial, CRASHES, f"{type(error).__name__}: {first_line(error)}")


def tried(architecture: Architecture) -> Row:
    """Return the row of one architecture."""
    row = Row(architecture.package, architecture.name)
    started = time.process_time()
    given = _made(architecture)
    row.params = parameters(given.model)
    results = {name: _compressed(row, name, given, selector()) for name, selector in SELECTORS.items()}
    if (first := next(filter(None, results.values()), None)) is not None:
        row.dense_share = _left_dense(first)
    written = next((result for result in map(results.get, PREFERRED) if result is not None and result.plan), None)
    if written is not None:
        with tempfile.TemporaryDirectory() as folder:
            for form in FORMS[: None if architecture.onnx else -1]:
                _written(row, form, written, architecture, Path(folder) / form)
    row.seconds = time.process_time() - started
    return row


def _made(architecture: Architecture, seed: int = 0) -> Given:
    torch.manual_seed(seed)
    return architecture.make()


def _compressed(row: Row, name: str, given: Given, selector: Any) -> Compressed | None:
    """Compress the model and check the result. Return it, or None where there is none that is right."""
    before = {key: value.clone() for key, value in given.model.state_dict().items()}
    try:
        result: Compressed = spectrim.compress(
            given.model, calibration=given.batches, verification=given.batches, algorithm=selector, loss=given.loss
        )
        wrong = _wrong(result, given, before)
    except Exception as error:  # whatever a model of other people's raises
        row.failed(name, error)
        return None
    row.note(name, WRONG if wrong else WORKS if result.plan else LEFT, wrong)
    return None if wrong else result


def _wrong(result: Compressed, given: Given, before: dict[str, Tensor]) -> str:
    """Return what is wrong with a result, or an empty string."""
    after = given.model.state_dict()
    changed = [key for key, value in before.items() if not torch.equal(value, after[key])]
    if changed or len(before) != len(after):
        return f"the given model has changed: {', '.join(changed) or 'its state'}"
    inputs = next(iter(pairs(given.batches, "calibration")))[0]
    if not all(bool(tensor.isfinite().all()) for tensor in outputs_of(result.model, inputs)):
        return "its outputs are not finite"
    try:
        dense = _multiplied(given.model, result)
        with _seeded(dense, result.model):
            require_same(dense, result.model, inputs, "the products as weights", "factored wrongly")
    except (UserError, AttributeError) as error:
        return first_line(error)
    return ""


def _multiplied(model: nn.Module, result: Compressed) -> nn.Module:
    """Return a copy of the dense model with the product of the factors as the weight of each factored layer.

    Biases and the means of BatchNorm are those of the result, too, since a refit shifts them.
    """
    dense = copy.deepcopy(model)
    small = dict(result.model.named_modules())
    with torch.no_grad():
        for name, value in (*dense.named_parameters(), *dense.named_buffers()):
            owner, _, own = name.rpartition(".")
            value.copy_(getattr(small[owner], own))
    return dense


def _seeded(*models: nn.Module) -> AbstractContextManager[None]:
    """Seed the random numbers before each forward pass in the block: some models draw them in eval mode, too."""
    return hooked(before=[(model, _seed) for model in models])


def _seed(*_: Any) -> None:
    torch.manual_seed(0)


def _left_dense(result: Compressed) -> float:
    """Return the part of the parameters outside of the layers that the report lists."""
    inside = int(result.report["params_before"].sum())
    return 1 - inside / parameters(result.dense)


def _written(row: Row, form: str, result: Compressed, architecture: Architecture, path: Path) -> None:
    """Write the result and read it back. The export itself compares what it wrote with the model."""
    try:
        if form == "loads":
            file = path.with_suffix(".safetensors")
            result.save(file)
            other = _made(architecture, seed=1).model  # of other weights, so that each must come from the file
            loaded = spectrim.load(file, into=other).eval()
            with _seeded(loaded, result.model):
                require_same(loaded, result.model, result.example, "the loaded weights", "compare the files")
        else:
            result.export(form, path)  # type: ignore[arg-type]
        row.note(form, WORKS)
    except Exception as error:
        row.failed(form, error)
