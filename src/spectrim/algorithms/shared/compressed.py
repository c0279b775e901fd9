"""What an algorithm is, and what it returns: a compressed model with its plan, its report and its cost."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pandas as pd
from torch import nn

from spectrim.batches import Inputs
from spectrim.checkpoints import single_file
from spectrim.decomposers.spectrum import Decomposer
from spectrim.errors import UserError
from spectrim.factored.plan import RankPlan
from spectrim.statistics.batchnorm import SAMPLES, BatchNorm, reestimate
from spectrim.statistics.objective import Objective
from spectrim.surgery.cost import Cost, model_cost, parameters


@runtime_checkable
class Algorithm(Protocol):
    """A selector. ``compress`` leaves the given model as it was and sees only what ``objective`` holds."""

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> "Compressed":
        """Select what to keep of each layer, and return the compressed copy."""


@dataclass(frozen=True)
class Compressed:
    """A compressed model, how it was made, and what it costs.

    ``report``: one row a layer that could be factored: layer, shape, full_rank, break_even, rank (None: left dense),
    params_before, params_after, predicted_change (of the calibration loss, to first order), relative_error.
    ``log``: the steps of the algorithm; ``notes``: which layers could not be factored, and why; ``trained``: whether
    the weights left are no longer those of the given model. ``reporting``: what the report took, which no selection
    needs: seconds, cpu_seconds and samples_read of each split; where the selector had taken the gradients, next to
    nothing.
    """

    model: nn.Module
    plan: RankPlan
    report: pd.DataFrame
    dense: nn.Module = field(repr=False)
    example: Inputs = field(repr=False)
    log: list[dict] = field(default_factory=list, repr=False)
    notes: list[str] = field(default_factory=list)
    trained: bool = False
    reporting: dict[str, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def cost(self) -> Cost:
        """Parameters and MACs of the compressed model."""
        return model_cost(self.model, self.example)

    @cached_property
    def dense_cost(self) -> Cost:
        """Parameters and MACs of the given model."""
        return model_cost(self.dense, self.example)

    @property
    def params_kept(self) -> float:
        """Parameters of the whole compressed model over those of the whole dense one."""
        return parameters(self.model) / parameters(self.dense)

    @property
    def macs_kept(self) -> float:
        """MACs of the whole compressed model over those of the whole dense one."""
        return self.cost.macs / self.dense_cost.macs

    @property
    def predicted_change(self) -> float:
        """First-order change of the calibration loss, summed over the factored layers."""
        return float(self.report.loc[self.report["rank"].notna(), "predicted_change"].sum())

    def settle(self, batch_norm: BatchNorm, objective: Objective) -> "Compressed":
        """Itself, its BatchNorm statistics re-estimated on calibration samples where ``batch_norm`` is ``follow``.

        Raises ``UserError`` after a training, whose statistics are its own.
        """
        if batch_norm == "follow" and self.trained:
            raise UserError("batch_norm=follow compares with the given model, which a training leaves: use keep")
        if batch_norm == "follow" and self.plan:
            reestimate(self.model, self.dense, objective, SAMPLES)
        return self

    def save(self, path: str | Path) -> None:
        """Write the compressed model as safetensors; ``spectrim.load(path, into=dense_model)`` reads it back."""
        single_file.save(path, self.model, self.plan)
