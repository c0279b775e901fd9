"""Train U, S and V, and cut them between epochs: SVD training with rank selection (S2, Algorithm 3)."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spectrim.algorithms.rank_selection import bisections, check_bisection, on_subset, rank_at
from spectrim.algorithms.shared.bisection import bisect
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.trained import finished, plain_svd, train_by_settings
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.spectrum import Decomposer
from spectrim.errors import UserError
from spectrim.factored import linalg
from spectrim.statistics.objective import Objective
from spectrim.tools.settings import settings
from spectrim.training import svd_weights
from spectrim.training.fit import Callbacks
from spectrim.training.recipe import Recipe

Ranks = dict[str, int]


@settings
class SVDTraining:
    """Train every layer that can be factored as ``U diag(S) Vh``, and lower its rank between epochs.

    The loss is that of the task plus two penalties. ``orthogonality`` weighs the mean squared distance of U^T U and
    V^T V from the identity (Yang et al., arXiv 2004.09031). ``strength`` weighs the ``regulariser`` of each layer's
    singular values. An untrained model is trained from scratch, and a trained one goes on. The factors have no weight
    decay.

    Between epochs the factors are made orthonormal, which does not change the function. They are then cut by the
    bisection of ``RankSelection``, and the optimizer's state is cut with them. At the end a layer above break-even
    becomes dense again.

    ``recipe``: how to train.
    ``regulariser``: ``"nuclear"``, the sum of the singular values; ``"hoyer"``, that sum over their 2-norm; or
        ``"none"``. It serves to lower ranks, so it ends with the last selection.
    ``bounded``: whether to divide the gradients of the factors, so that no step moves the weight further than a step on
        the weight itself would (``svd_weights.bound_steps``). The source does not. Without it, a learning rate that
        suits the dense network is too large for its factors.
    ``priced``: whether the threshold of a layer grows with the root of what one of its ranks costs. The threshold of
        the layer with the most expensive ranks is delta. As printed, all layers share one threshold, so a small layer
        is cut as hard as a large one.
    ``epsilon``, ``relative``, ``delta_step``: the bisection, see ``RankSelection``.
    ``split``: the split on which a selection measures the task's loss.
    ``subset``: number of samples of ``split`` that are used, from the first; None uses all.
    ``every``: number of epochs between two selections.
    ``warm_up``: number of epochs before the first selection.
    ``cool_down``: number of epochs after the last selection.
    ``seed``: seed of the training.
    ``state``: the file from which an interrupted training goes on; None keeps nothing.
    """

    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=8, lr=0.05))
    regulariser: Literal["nuclear", "hoyer", "none"] = "hoyer"
    strength: float = 0.01
    orthogonality: float = 1.0
    bounded: bool = True
    priced: bool = False
    epsilon: float = 0.005
    relative: bool = False
    delta_step: float = 1e-3
    split: Literal["train", "calibration"] = "train"
    subset: int | None = None
    every: int = 1
    warm_up: int = 0
    cool_down: int = 0
    seed: int = 0
    state: str | None = None

    def __post_init__(self) -> None:
        check_bisection(self.epsilon, self.delta_step, self.subset)
        if not (0 <= self.strength < math.inf and 0 <= self.orthogonality < math.inf):
            raise UserError(f"strength and orthogonality are at least 0, got {self.strength} and {self.orthogonality}")
        if self.every < 1 or self.warm_up < 0 or self.cool_down < 0:
            got = f"{self.every}, {self.warm_up}, {self.cool_down}"
            raise UserError(f"every must be at least 1, warm_up and cool_down at least 0 epochs, got {got}")

    def selects(self, epoch: int) -> bool:
        """Return whether ranks are selected after ``epoch``, counted from 0."""
        done = epoch + 1
        return self.warm_up < done <= self.recipe.epochs - self.cool_down and (done - self.warm_up) % self.every == 0

    def regularises(self, epoch: int) -> bool:
        """Return whether a selection follows ``epoch`` or a later one, so that the regulariser is of use."""
        return any(self.selects(later) for later in range(epoch, self.recipe.epochs))

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Train and cut a copy of ``model``.

        The log has an entry for each epoch: the mean of each term of the loss, and the rank of each layer. Each step of
        the bisection is there, too (delta, loss, passed, rank_kept).

        Raises ``UserError`` for another decomposer than ``SVD``, for missing train batches, and where the loss stops
        being finite. ``state`` then holds the last good epoch.
        """
        decomposer = plain_svd(decomposer, "SVD training")
        objective.given("train")  # refused before the decomposition
        bench = Workbench.of(model, decomposer, objective)
        net = bench.to_train()
        for name, spectrum in bench.spectra.items():
            svd_weights.unfold(net.get_submodule(name), spectrum)  # type: ignore[arg-type]
            if self.bounded:
                svd_weights.bound_steps(net.get_submodule(name))
        callbacks = _Callbacks(self, net, tuple(bench.spectra), on_subset(objective, self.split, self.subset))
        factors = {part for name in callbacks.layers for part in svd_weights.factor_names(name)}
        curve = train_by_settings(
            self,
            net,
            objective,
            decomposer,
            Callbacks(penalties=callbacks.penalties, after_epoch=callbacks.after_epoch),
            undecayed=factors,
        )
        return finished(model, net, callbacks.ranks(), curve, decomposer, objective)


class _Callbacks:
    """Add the penalties of the factors to the loss, and select their ranks between epochs."""

    def __init__(self, chosen: SVDTraining, net: nn.Module, layers: Sequence[str], judged: Objective) -> None:
        self.settings, self.net, self.layers, self.judged = chosen, net, layers, judged

    def factors(self) -> dict[str, linalg.SVD]:
        return {name: svd_weights.svd_of(self.net.get_submodule(name)) for name in self.layers}

    def ranks(self) -> Ranks:
        return {name: factors.S_R.shape[-1] for name, factors in self.factors().items()}

    def penalties(self, epoch: int) -> dict[str, Tensor]:
        """Return the terms that are added to the loss of the task: each summed over the layers, times its weight."""
        chosen, layers = self.settings, self.factors().values()
        terms = {}
        if chosen.orthogonality:
            terms["orthogonality"] = chosen.orthogonality * _sum(linalg.orthogonality(factors) for factors in layers)
        if chosen.regulariser != "none" and chosen.strength and chosen.regularises(epoch):
            measure = linalg.hoyer if chosen.regulariser == "hoyer" else linalg.nuclear
            # A grouped convolution is one block-diagonal matrix, so its groups count together.
            terms[chosen.regulariser] = chosen.strength * _sum(measure(factors.S_R.flatten()) for factors in layers)
        return terms

    def after_epoch(self, epoch: int, net: nn.Module, optimizer: torch.optim.SGD) -> dict[str, Any]:
        steps = self._select(optimizer) if self.settings.selects(epoch) else []
        ranks = self.ranks()
        return {"rank": sum(ranks.values()), "ranks": ranks, "bisection": steps}

    def _select(self, optimizer: torch.optim.SGD) -> list[dict]:
        """Cut all layers at the largest delta whose loss stays within epsilon. Return the deltas tried."""
        for name in self.layers:
            svd_weights.orthogonalise(self.net.get_submodule(name), optimizer)
        full, loss = self.ranks(), self._loss()
        epsilon = self.settings.epsilon * (abs(loss) if self.settings.relative else 1.0)
        weights = self._weights()
        losses, steps = {tuple(full.values()): loss}, [_step(0.0, loss, True, 1.0)]

        def at(delta: float) -> Ranks | None:
            ranks = {name: rank_at(one.S_R.amax(0), delta * weights[name]) for name, one in self.factors().items()}
            key = tuple(ranks.values())
            if key not in losses:  # deltas between the same two singular values give the same model
                with self._zeroed(ranks):
                    losses[key] = self._loss()
            passed = abs(losses[key] - loss) < epsilon
            steps.append(_step(delta, losses[key], passed, sum(key) / sum(full.values())))
            return ranks if passed else None

        chosen = bisect(at, 0.0, 1.0, bisections(self.settings.delta_step), "bisect") or full
        for name, rank in chosen.items():
            svd_weights.truncate(self.net.get_submodule(name), rank, optimizer)
        return steps

    def _weights(self) -> dict[str, float]:
        """Return the factor of delta in each layer."""
        prices = {name: one.U_OR[..., 0].numel() + one.Vh_RI[..., 0, :].numel() for name, one in self.factors().items()}
        most = max(prices.values(), default=1)
        return {name: math.sqrt(price / most) if self.settings.priced else 1.0 for name, price in prices.items()}

    def _loss(self) -> float:
        with parametrize.cached():
            return self.judged.evaluate(self.net, self.settings.split).loss

    @contextmanager
    def _zeroed(self, ranks: Mapping[str, int]) -> Iterator[None]:
        """Set the singular values beyond ``ranks`` to zero inside the block."""
        before = {name: factors.S_R.detach().clone() for name, factors in self.factors().items()}
        with torch.no_grad():
            for name, factors in self.factors().items():
                factors.S_R[..., ranks[name] :] = 0
            yield
            for name, factors in self.factors().items():
                factors.S_R.copy_(before[name])


def _step(delta: float, loss: float, passed: bool, rank_kept: float) -> dict[str, Any]:
    return {"delta": delta, "loss": loss, "passed": passed, "rank_kept": rank_kept}


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()
