"""Rank selection (S2, Algorithms 1 and 2): one threshold on the relative singular values, found on the loss."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

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

T = TypeVar("T")


@settings
class RankSelection:
    """Every layer keeps the components with ``sigma_k / sigma_1 >= delta``, one ``delta`` in [0, 1] for all of them.

    ``delta="bisect"``: the largest one found, by bisection down to ``delta_step``, in (0, 1), at which the mean loss is
    within ``epsilon`` of the dense model's, above or below; ``relative``: epsilon is a fraction of the dense loss.
    ``delta="theory"``: S2's Theorem 2, which asks for no search, but for cross-entropy and for a chain of Linear,
    Conv2d and known activations. Losses are those of the first ``subset`` samples of ``split``, of all where None.

    A layer whose rank would lie above break-even stays dense, in what is measured as in what is returned. S2's
    Algorithm 1 is mended: its midpoint is (l + u) / 2, and what it returns is the last delta that passed.
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
        """Find delta and cut. The log has each delta tried: its loss, whether it passed, the part kept of all
        components (before layers above break-even are left dense) and that of the whole model's parameters.

        At most ``ceil(log2(1 / delta_step)) + 1`` losses are taken, that of the dense model (delta = 0) among them.
        Raises ``UserError`` for a layer without singular values, and where ``delta="theory"`` does not apply.
        """
        if self.delta == "theory":
            _ask_for_cross_entropy(objective.loss)
        bench = Workbench.of(model, decomposer, objective)
        judged = on_subset(objective, self.split, self.subset)
        search = _DeltaSearch(bench, judged, self.split, self.epsilon, self.relative)
        if self.delta == "theory":
            chain = chain_of(model, decomposer, bench.example)
            norm = chain.input_norm(judged.batches(self.split))
            best = search.at(min(1.0, bounds.delta(chain.stages, search.epsilon, norm, "cross_entropy")))
        else:
            best = bisect(search.at, self.delta_step)
        return replace(best or bench.finish({}), log=search.log)


def check_bisection(epsilon: float, delta_step: float, subset: int | None) -> None:
    """Raise ``UserError`` for settings with which Algorithm 1 cannot work."""
    if not 0 < epsilon < math.inf:
        raise UserError(f"epsilon, a change of the loss, must be finite and above 0, got {epsilon}")
    if not 0 < delta_step < 1:
        raise UserError(f"delta_step must lie in (0, 1), got {delta_step}")
    if subset is not None and subset < 1:
        raise UserError(f"subset must be at least 1 sample (or null, for all), got {subset}")


def bisect(at: Callable[[float], T | None], delta_step: float) -> T | None:
    """Algorithm 1: what ``at`` gives for the largest delta found that passes (is not None); None where none tried does.

    ``at`` is called ``ceil(log2(1 / delta_step))`` times.
    """
    low, high, best = 0.0, 1.0, None
    for _ in tqdm(range(math.ceil(-math.log2(delta_step))), "bisect", unit="step", leave=False, disable=None):
        middle = (low + high) / 2
        found = at(middle)
        low, high, best = (low, middle, best) if found is None else (middle, high, found)
    return best


def rank_at(S_R: Tensor, delta: float) -> int:
    """Algorithm 2: the largest k with ``sigma_k / sigma_1 >= delta``, at least 1, of singular values that fall."""
    return max(1, int(S_R.ge(delta * S_R[0]).sum()))


def singular_values(name: str, spectrum: Spectrum) -> Tensor:
    """The singular values by which layer ``name`` is cut, falling. Raises ``UserError`` where it has none.

    A grouped convolution is one block-diagonal matrix, cut to the same rank in every block: sigma_k is the largest k-th
    singular value of any group, so that ``sigma_{k+1}`` is the norm of what rank k drops, as the theorems ask.
    """
    if isinstance(spectrum, MatrixSpectrum):
        return spectrum.importance.amax(0)  # of the whitened weight, where the decomposition whitens
    raise UserError(f"layer {name}: rank selection needs singular values; {type(spectrum).__name__} has none")


class _DeltaSearch:
    """The deltas tried on one model."""

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
        """The model cut at ``delta``, or None where its loss is too far from the dense one."""
        ranks = {name: rank_at(S_R, delta) for name, S_R in self.sigma.items()}
        cut = self.bench.finish(ranks)
        if cut.plan not in self.losses:  # deltas between the same two singular values give one and the same model
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
    """The same loss on the first ``subset`` samples of ``split``, read once."""
    if subset is None:
        return objective
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
