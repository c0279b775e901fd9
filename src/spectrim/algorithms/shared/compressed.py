"""Define an algorithm and what it returns: a compressed model with its plan, its report and its cost."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pandas as pd
from torch import nn

from spectrim.algorithms.shared.layer_report import Reporter
from spectrim.batches import Inputs
from spectrim.checkpoints import quantizer, single_file
from spectrim.decomposers.spectrum import Decomposer
from spectrim.decomposers.svd import SVD
from spectrim.errors import MissingInput, UserError
from spectrim.export import kinds
from spectrim.factored.plan import RankPlan
from spectrim.statistics.batchnorm import SAMPLES, BatchNorm, reestimate
from spectrim.statistics.objective import Objective
from spectrim.surgery.cost import Cost, model_cost, parameters


@runtime_checkable
class Algorithm(Protocol):
    """Select ranks. ``compress`` leaves the given model as it was and sees only what ``objective`` holds."""

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> "Compressed":
        """Select what to keep of each layer, and return the compressed copy."""


def decomposer_of(algorithm: Algorithm) -> Decomposer:
    """Return the decomposer that ``algorithm`` is best with, its ``decomposer``; plain SVD where it names none."""
    return getattr(algorithm, "decomposer", SVD())


@dataclass(frozen=True, repr=False)
class Compressed:
    """Hold a compressed model, how it was made, and what it costs.

    ``plan``: what is kept of each layer that is factored.
    ``reporter``: makes ``report``.
    ``dense``: the given model.
    ``example``: the inputs of the first calibration batch; None where none were given.
    ``log``: the steps of the algorithm.
    ``notes``: which layers stay dense and why, and what else is worth knowing.
    ``trained``: whether the weights that are left differ from those of the given model.
    ``every_size``: writes the file of every size; None where the algorithm does not choose by one order.
    """

    model: nn.Module
    plan: RankPlan
    reporter: Reporter
    dense: nn.Module
    example: Inputs | None
    log: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    trained: bool = False
    every_size: Callable[[Path], None] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        quantizer.announce(self.model, self.plan)

    def __repr__(self) -> str:
        """Return one line, as a model and its plan may have thousands."""
        kept = f"{100 * self.params_kept:.1f} % of the parameters, {len(self.plan)} layers factored"
        return f"Compressed {type(self.dense).__name__}: {kept}; report and notes tell more"

    @property
    def report(self) -> pd.DataFrame:
        """Return one row for each layer that could be factored.

        layer, shape, full_rank, break_even, rank (missing: left dense), params_before, params_after, predicted_change
        (of the calibration loss, to first order) and relative_error (of the weight). It is made when it is first read.
        predicted_change takes a gradient then, and is NaN where that fails, for want of targets for example.
        """
        return self.reporter().layers

    @property
    def reporting(self) -> dict[str, Any]:
        """Return what the report took: seconds, cpu_seconds, and samples_read by split. No selection needs it."""
        return self.reporter().spent

    @cached_property
    def cost(self) -> Cost:
        """Count the parameters and the MACs of the compressed model."""
        return model_cost(self.model, self._example())

    @cached_property
    def dense_cost(self) -> Cost:
        """Count the parameters and the MACs of the given model."""
        return model_cost(self.dense, self._example())

    @property
    def params_kept(self) -> float:
        """Return the parameters of the whole compressed model over those of the whole dense one."""
        return parameters(self.model) / parameters(self.dense)

    @property
    def macs_kept(self) -> float:
        """Return the MACs of the whole compressed model over those of the whole dense one."""
        return self.cost.macs / self.dense_cost.macs

    @property
    def predicted_change(self) -> float:
        """Return the first-order change of the calibration loss, summed over the factored layers.

        Raises ``UserError`` where it could not be predicted, with the reason.
        """
        report = self.reporter()
        if report.unpredicted:
            raise UserError(report.unpredicted)
        return float(report.layers.loc[report.layers["rank"].notna(), "predicted_change"].sum())

    def _example(self) -> Inputs:
        if self.example is None:
            raise MissingInput("MACs are counted by running the model; pass calibration=, batches of its inputs")
        return self.example

    def settle(self, batch_norm: BatchNorm, objective: Objective) -> "Compressed":
        """Re-estimate the BatchNorm statistics on calibration samples if ``batch_norm`` is ``follow``; return itself.

        Raises ``UserError`` after a training, which has statistics of its own.
        """
        if batch_norm == "follow" and self.trained:
            raise UserError("batch_norm=follow compares with the given model, which a training leaves: use keep")
        if batch_norm == "follow" and self.plan:
            reestimate(self.model, self.dense, objective, SAMPLES)
        return self

    def save(self, path: str | Path, *, every_size: bool = False) -> None:
        """Write the compressed model as safetensors. ``spectrim.load(path, into=dense_model)`` reads it back.

        ``every_size``: write all components of the given model instead, in at most twice its size. A budget is then
            chosen when the file is loaded: ``spectrim.load(path, into=dense_model, params_kept=0.7)``. Of the
            algorithms, ``Joint`` can do so, with ``ranks="knapsack"`` and ``step=1``.

        Raises ``UserError`` for ``every_size`` after any other algorithm, or where the given model has changed since.
        """
        if not every_size:
            single_file.save(path, self.model, self.plan)
        elif self.every_size is None:
            raise UserError("every_size=True needs algorithm=Joint(…) with ranks=knapsack and step=1, the defaults")
        else:
            self.every_size(Path(path))

    def export(
        self,
        kind: kinds.ExportKind,
        path: str | Path,
        *,
        example: Inputs | None = None,
        dynamic: bool = True,
        opset: int = 18,
    ) -> None:
        """Write the compressed model in a form that is read without spectrim.

        ``kind``: ``"plain"`` makes ``path`` a folder with the weights and the code that puts layers of torch in place
            of the dense ones. Pivoted factors become plain ones, which are larger. The model's own code is then needed,
            and ``"pt2"`` and ``"onnx"`` do without it: one file for ``torch.export.load``, or for a runtime of ONNX.
        ``example``: inputs to trace the model with; those of the first calibration batch by default.
        ``dynamic``: whether a traced model takes any number of samples and, where it allows, of token ids.
        ``opset``: version of the operators of ONNX.

        What is written computes the outputs of ``model`` on the example, or ``UserError`` is raised. So it is where the
        model cannot be traced, an extra package is missing, or ``path`` cannot be written.
        """
        kinds.write(kind, Path(path), self.model, self.example if example is None else example, dynamic, opset)
