"""Rank selection (S2, Algorithms 1 and 2): find one threshold on the relative singular values of all layers."""

import math
from dataclasses import replace
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.algorithms.shared.bisection import bisect
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.batches import first_samples, sample_count
from spectrim.decomposers.matrix import MatrixSpectrum
from spectrim.decomposers.spectrum import Decomposer, Spectrum
from spectrim.errors import UserError
from spectrim.factored.plan import RankPlan
from spectrim.losses import Loss
from spectrim.statistics.objective import Objective
from spectrim.surgery.cost import parameters
from spectrim.theory import bounds
from spectrim.theory.chain import chain_of
from spectrim.tools.settings import settings


@settings
class RankSelection:
    """Keep in every layer the components with ``sigma_k / sigma_1 >= delta``, with one delta in [0, 1] for all layers.

    ``delta``: ``"bisect"`` searches for the largest delta at which the mean loss stays within ``epsilon`` of the dense
        model's, above or below. ``"theory"`` takes the delta of S2's Theorem 2 without a search. It needs cross-entropy
        and a chain of Linear, Conv2d and known activations.
    ``epsilon``: the change of the loss that is allowed, above 0.
    ``relative``: whether ``epsilon`` is a fraction of the dense loss.
    ``delta_step``: the bisection ends when delta is known to this width, in (0, 1).
    ``split``: the split on which the loss is measured.
    ``subset``: number of samples of ``split`` that are used, from the first; None uses all.

    A layer stays dense where its rank would lie above break-even, in the models that are measured as in the result.
    Two slips of S2's Algorithm 1 are corrected: the midpoint is (l + u) / 2, and the result is the last delta that
    passed.
    """

    epsilon: float = 0.01
    relative: bool = False
    delta: Literal["bisect", "theory"] = "bisect"
    delta_step: float = 1e-3
    split: Literal["calibration", "train"] = "calibration"
    subset: int | None = None

    def __post_init__(self) -> None:
        check_bisection(self.epsilon, self.delta_step, self.subset)

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Find delta and cut. At most ``ceil(log2(1 / delta_step)) + 1`` losses are measured.

        The log has an entry for each delta, 0 (the dense model) among them: its loss, whether it passed, and the parts
        of components and parameters that are kept. That of the components counts layers above break-even, too, which
        are left dense.

        Raises ``UserError`` for a layer without singular values, and where ``delta="theory"`` does not apply.
        """
        if self.delta == "theory":
            _ask_for_cross_entropy(objective.loss)
        bench = Workbench.of(model, decomposer, objective)
        judged = on_subset(objective, self.split, self.subset)
        search = _DeltaSearch(bench, judged, self.split, self.epsilon, self.relative)
        if self.delta == "theory":
            chain = chain_of(bench.model, decomposer, bench.example_for("delta=theory"))
            norm = chain.input_norm(judged.batches(self.split))
            best = search.at(min(1.0, bounds.delta(chain.stages, search.epsilon, norm, "cross_entropy")))
        else:
            best = bisect(search.at, 0.0, 1.0, bisections(self.delta_step), "bisect")
        return replace(best or bench.finish({}), log=search.log)


def check_bisection(epsilon: float, delta_step: float, subset: int | None) -> None:
    """Raise ``UserError`` for settings of Algorithm 1 that are out of range."""
    if not 0 < epsilon < math.inf:
        raise UserError(f"epsilon, a change of the loss, must be finite and above 0, got {epsilon}")
    if not 0 < delta_step < 1:
        raise UserError(f"delta_step must lie in (0, 1), got {delta_step}")
    if subset is not None and subset < 1:
        raise UserError(f"subset must be at least 1 sample (or null, for all), got {subset}")


def bisections(delta_step: float) -> int:
    """Return how many halvings of [0, 1] give an interval of at most ``delta_step``."""
    return math.ceil(-math.log2(delta_step))


def rank_at(S_R: Tensor, delta: float) -> int:
    """Return the largest k with ``sigma_k / sigma_1 >= delta``, and at least 1 (S2, Algorithm 2).

    ``S_R``: singular values in descending order, shape (R,).
    """
    return max(1, int(S_R.ge(delta * S_R[0]).sum()))


def singular_values(name: str, spectrum: Spectrum) -> Tensor:
    """Return the singular values by which layer ``name`` is cut, in descending order. Shape (R,).

    A grouped convolution is one block-diagonal matrix, and all its blocks are cut to the same rank. So sigma_k is the
    largest k-th singular value of any group. Rank k then drops a matrix of norm ``sigma_{k+1}``, as the theorems need.
    Raises ``UserError`` for a layer without singular values.
    """
    if isinstance(spectrum, MatrixSpectrum):
        return spectrum.importance.amax(0)  # of the whitened weight, where the decomposition whitens
    raise UserError(f"layer {name}: rank selection needs singular values; {type(spectrum).__name__} has none")


class _DeltaSearch:
    """Try deltas on one model. ``log`` has an entry for each."""

    def __init__(self, bench: Workbench, objective: Objective, split: str, epsilon: float, relative: bool) -> None:
        self.bench, self.objective, self.split = bench, objective, split
        self.sigma = {name: singular_values(name, spectrum) for name, spectrum in bench.spectra.items()}
        self.dense = objective.evaluate(bench.model, split).loss
        self.epsilon = epsilon * abs(self.dense) if relative else epsilon
        if not self.epsilon:
            raise UserError("epsilon is a fraction of the dense loss, and that is 0: give relative=false")
        self.losses = {RankPlan(): self.dense}
        self.log: list[dict] = []
        self._note(0.0, self.dense, True, 1.0, 1.0)

    def at(self, delta: float) -> Compressed | None:
        """Return the model cut at ``delta``, or None where its loss is too far from the dense one."""
        ranks = {name: rank_at(S_R, delta) for name, S_R in self.sigma.items()}
        cut = self.bench.finish(ranks)
        if cut.plan not in self.losses:  # deltas between the same two singular values give the same model
            self.losses[cut.plan] = self.objective.evaluate(cut.model, self.split).loss
        loss = self.losses[cut.plan]
        passed = abs(loss - self.dense) < self.epsilon
        rank_kept = sum(ranks.values()) / sum(map(len, self.sigma.values()))
        self._note(delta, loss, passed, rank_kept, parameters(cut.model) / parameters(self.bench.model))
        return cut if passed else None

    def _note(self, delta: float, loss: float, passed: bool, rank_kept: float, params_kept: float) -> None:
        self.log.append(
            {"delta": delta, "loss": loss, "passed": passed, "rank_kept": rank_kept, "params_kept": params_kept}
        )


def on_subset(objective: Objective, split: str, subset: int | None) -> Objective:
    """Return the same loss on the first ``subset`` samples of ``split``, which are held in memory.

    Raises ``UserError`` where the split has fewer samples.
    """
    if subset is None:
        return objective
    if objective.processes(split).size > 1:
        raise UserError(f"subset= is of one process alone; give each a smaller part in Distributed(…) as {split}=")
    taken, left = [], subset
    for inputs, targets in objective.batches(split):
        count = sample_count(targets, inputs)
        taken.append((first_samples(inputs, left, count), first_samples(targets, left, count)))
        left -= min(left, count)
        if not left:
            return objective.on({split: taken})
    raise UserError(f"subset={subset} is more than the {subset - left} samples of the {split} split")


def _ask_for_cross_entropy(loss: Loss) -> None:
    plain = isinstance(loss, nn.CrossEntropyLoss) and loss.reduction == "mean" and loss.weight is None
    if loss is not F.cross_entropy and not plain:
        raise UserError("delta=theory is a theorem on cross-entropy: pass loss=F.cross_entropy, or use delta=bisect")
