"""Not a selector but a measurement: how far truncation moves the outputs, beside how far Theorem 1 lets it."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.batches import Batches, device_of, evaluating, forward, to_device
from spectrim.decomposers.spectrum import Decomposer
from spectrim.errors import UserError
from spectrim.statistics.objective import Objective
from spectrim.surgery import replacing
from spectrim.theory import bounds
from spectrim.theory.chain import chain_of
from spectrim.tools.settings import settings


@settings
class BoundProbe:
    """Cut every layer to each of the ``ratios`` of its full rank, all at once, and measure (S2, Theorems 1 and 2).

    The log holds, for every ratio: the largest 2-norm by which an output moves (``measured``), the mean loss's change,
    and what the theorems allow for both (``bound``, ``loss_bound``, the latter for cross-entropy), on the calibration
    split. Where no theorem applies the two are null and a note says why. Ranks above break-even are measured too; the
    model is returned dense.
    """

    ratios: Sequence[float] = (0.25, 0.5, 0.75)

    def __post_init__(self) -> None:
        if not self.ratios or not all(0 < ratio < 1 for ratio in self.ratios):
            raise UserError(f"ratios, parts of the full rank, must lie in (0, 1), got {list(self.ratios)}")

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Measure; nothing is compressed. Raises ``UserError`` where the model's output is not one tensor."""
        bench = Workbench.of(model, decomposer, objective)
        batches = objective.batches("calibration")
        bound_at, notes = _bound(bench, decomposer, batches)
        dense_loss = objective.evaluate(model).loss
        log: list[dict] = []
        for ratio in tqdm(self.ratios, "bounds", unit="ratio", leave=False, disable=None):
            ranks = {name: max(1, round(ratio * spectrum.max_rank)) for name, spectrum in bench.spectra.items()}
            cut = copy.deepcopy(model)
            for name, rank in ranks.items():
                replacing.replace(cut, name, bench.spectra[name].factor(rank))
            bound = bound_at(ranks)
            log.append(
                {
                    "ratio": ratio,
                    "measured": largest_move(model, cut, batches),
                    "bound": bound,
                    "loss_change": objective.evaluate(cut).loss - dense_loss,
                    "loss_bound": None if bound is None else bounds.LOSS_LIPSCHITZ["cross_entropy"] * bound,
                    "split": "calibration",
                }
            )
        return replace(bench, notes=(*bench.notes, *notes)).finish({}, log)


def _bound(
    bench: Workbench, decomposer: Decomposer, batches: Batches
) -> tuple[Callable[[Mapping[str, int]], float | None], list[str]]:
    """Theorem 1 for ranks of layers, or None with a note where it does not apply."""
    try:
        chain = chain_of(bench.model, decomposer, bench.example)
    except UserError as error:
        return lambda ranks: None, [f"no bound: {error}"]
    norm = chain.input_norm(batches)
    stages = chain.stages
    return lambda ranks: bounds.output_bound(stages, [ranks.get(stage.name) for stage in stages], norm), []


def largest_move(model: nn.Module, cut: nn.Module, batches: Batches) -> float:
    """The largest 2-norm, over all samples, of the difference of two models' outputs."""
    device, largest = device_of(model), 0.0
    with evaluating(model), evaluating(cut), torch.inference_mode():
        for inputs, _ in batches:
            before, after = (forward(net, to_device(inputs, device)) for net in (model, cut))
            if not isinstance(before, Tensor):
                raise UserError(f"outputs are compared as one tensor; this model gives a {type(before).__name__}")
            largest = max(largest, (before - after).double().flatten(1).norm(dim=1).max().item())
    return largest
