"""Measure how far truncation moves the outputs, beside how far Theorem 1 lets it move them."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from spectrim.algorithms.shared.measurement import Readings
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.batches import Batches, device_of, evaluating, forward, to_device
from spectrim.decomposers.spectrum import Decomposer
from spectrim.errors import UserError
from spectrim.statistics.objective import Objective
from spectrim.surgery import replacing
from spectrim.surgery.given_model import copied
from spectrim.theory import bounds
from spectrim.theory.chain import chain_of
from spectrim.tools.live import Bar
from spectrim.tools.settings import require_parts, settings

Bound = Callable[[Mapping[str, int]], float | None]  # the ranks of layers → the bound of Theorem 1


@settings
class BoundProbe:
    """Truncate all layers together, at each of ``ratios`` of their full rank, and measure (S2, Theorems 1 and 2).

    Every row of the readings belongs to one ratio, on the calibration split. ``measured`` is the largest 2-norm by
    which an output moves, and ``bound`` what Theorem 1 allows. ``loss_change`` is the change of the mean loss, and
    ``loss_bound`` what Theorem 2 allows for cross-entropy. Both bounds are None where no theorem applies, and a note
    says why. Ranks above break-even are measured too.
    """

    ratios: Sequence[float] = (0.25, 0.5, 0.75)

    def __post_init__(self) -> None:
        require_parts("ratios", self.ratios)

    def measure(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Readings:
        """Return one row for each ratio. Raises ``UserError`` where the model's output is not one tensor."""
        bench = Workbench.of(model, decomposer, objective)
        batches = objective.batches("calibration")
        bound_at, notes = _bound(bench, batches)
        dense_loss = objective.evaluate(model).loss
        rows: list[dict] = []
        for ratio in Bar(self.ratios, "bounds", unit="ratio", leave=False):
            ranks = {name: max(1, round(ratio * spectrum.max_rank)) for name, spectrum in bench.spectra.items()}
            truncated = copied(bench.model)
            for name, rank in ranks.items():
                replacing.replace(truncated, name, bench.spectra[name].factor(rank))
            bound = bound_at(ranks)
            rows.append(
                {
                    "ratio": ratio,
                    "measured": largest_move(model, truncated, batches),
                    "bound": bound,
                    "loss_change": objective.evaluate(truncated).loss - dense_loss,
                    "loss_bound": None if bound is None else bounds.LOSS_LIPSCHITZ["cross_entropy"] * bound,
                    "split": "calibration",
                }
            )
        return Readings(rows, [*bench.notes, *notes])


def _bound(bench: Workbench, batches: Batches) -> tuple[Bound, list[str]]:
    """Return the bound of Theorem 1, or one that is None everywhere and a note that says why."""
    try:
        chain = chain_of(bench.model, bench.decomposer, bench.example_for("the bound"))
    except UserError as error:
        return lambda ranks: None, [f"no bound: {error}"]
    norm, stages = chain.input_norm(batches), chain.stages
    return lambda ranks: bounds.output_bound(stages, [ranks.get(stage.name) for stage in stages], norm), []


def largest_move(model: nn.Module, truncated: nn.Module, batches: Batches) -> float:
    """Return the largest 2-norm, over all samples, of the difference of the outputs of two models.

    Raises ``UserError`` where the outputs are not one tensor.
    """
    device, largest = device_of(model), 0.0
    with evaluating(model), evaluating(truncated), torch.no_grad():
        for inputs, _ in batches:
            before, after = (forward(net, to_device(inputs, device)) for net in (model, truncated))
            if not isinstance(before, Tensor):
                raise UserError(f"outputs are compared as one tensor; this model gives a {type(before).__name__}")
            largest = max(largest, (before - after).double().flatten(1).norm(dim=1).max().item())
    return largest
