"""Bayesian optimisation over the ranks of all layers at once: what two papers' selectors share."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from tqdm import tqdm

from spectrim.algorithms.shared.budget import Costs
from spectrim.algorithms.shared.measured import Measurements
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.errors import UserError

RANDOM = 10  # vectors before the Gaussian process is asked
SMALLEST = 0.01  # ratio of a layer, so that a common factor can bring every layer back to dense

Ranks = dict[str, int]


class Tried(NamedTuple):
    """A vector of rank ratios, one a layer in [SMALLEST, 1], and the score of the ranks it stands for."""

    ratios: tuple[float, ...]
    score: float


@dataclass(frozen=True)
class Space:
    """What a vector of ratios stands for: ranks that always meet the budget, so that no evaluation is wasted.

    Ratio 1 is one rank above break-even, at which a layer stays dense. ``share``: of the cost of the dense model, met
    from below by one factor on all ratios; None: the ratios are taken as they are.
    """

    bench: Workbench
    costs: Costs
    share: float | None

    @cached_property
    def tops(self) -> Ranks:
        """The rank that ratio 1 stands for."""
        return {name: spectrum.break_even + 1 for name, spectrum in self.bench.spectra.items()}

    def ranks(self, ratios: Sequence[float]) -> Ranks:
        """Raises ``UserError`` for a budget out of reach."""

        def scaled(factor: float) -> Ranks:
            pairs = zip(self.tops.items(), ratios, strict=True)
            return {name: min(top, max(1, round(factor * ratio * top))) for (name, top), ratio in pairs}

        if self.share is None:
            return scaled(1.0)
        met = self.costs.meet(self.share, scaled, 0.0, 1 / SMALLEST)
        return {name: min(top, met[name]) for name, top in self.tops.items()}

    def alike(self, ratios: tuple[float, ...], ranks: Mapping[str, int]) -> list[tuple[float, ...]]:
        """Vectors that share one score: the one tried and, where a budget moved it, the one of its ``ranks``.

        A Gaussian process that knows of both sees after fewer evaluations that only the direction of a vector counts.
        """
        moved = tuple(max(SMALLEST, ranks[name] / top) for name, top in self.tops.items())
        return [ratios] if self.share is None else [ratios, moved]


@dataclass(frozen=True)
class BayesianSearch:
    """Search for the rank ratios of all layers with the least score.

    The first vector has the ratio 1/2 in every layer. The next ``RANDOM`` - 1 are random. Each later one is where a
    Gaussian process on all before it expects most improvement, or random where that one is known already.

    ``evaluations``: number of vectors. ``state``: file from which an interrupted search is resumed; None: it starts
    anew. ``identity``: what tells this search from another. Each vector depends on those before it and on ``seed``
    alone, so a resumed search equals an unbroken one.
    """

    space: Space
    evaluations: int
    seed: int
    state: str | None
    identity: Mapping[str, Any]

    def least(self, score: Callable[[Ranks], float], label: str) -> tuple[Ranks, list[dict]]:
        """The ranks with the least ``score`` found, and the log: of each vector its step, score, part of the cost kept,
        and whether it was measured, or stood for ranks that were measured before.

        Raises ``UserError`` for a budget out of reach and for a state that is cut short or of another search.
        """
        known: dict[tuple[int, ...], float] = {}
        told: list[Tried] = []
        log: list[dict] = []
        costs, read = self.space.costs, self.space.bench.objective.read
        with Measurements.opened(self.state, self.identity, read) as scores:
            for step in tqdm(range(self.evaluations), label, unit="model", leave=False, disable=None):
                ratios = self._propose(step, told, known)
                ranks = self.space.ranks(ratios)
                key = tuple(ranks.values())
                measured = key not in known
                if measured:
                    known[key] = scores.next(key, partial(_one, score, ranks))[0]
                told += [Tried(vector, known[key]) for vector in self.space.alike(ratios, ranks)]
                kept = {f"{costs.measure}_kept": costs.share(ranks)}
                log.append({"step": step, "score": known[key], **kept, "measured": measured})
        best = min(known, key=lambda key: known[key])
        return dict(zip(self.space.tops, best, strict=True)), log

    def _propose(self, step: int, told: Sequence[Tried], known: Collection[tuple[int, ...]]) -> tuple[float, ...]:
        layers = len(self.space.tops)
        if not step:
            return (0.5,) * layers
        own_seed = int(np.random.SeedSequence([self.seed, step]).generate_state(1)[0])
        if step >= RANDOM:
            ratios = propose(told, layers, own_seed)
            if tuple(self.space.ranks(ratios).values()) not in known:
                return ratios
        return propose([], layers, own_seed)


def propose(tried: Sequence[Tried], layers: int, seed: int) -> tuple[float, ...]:
    """The vector of most expected improvement on the least score in ``tried``; a random one where nothing is.

    The sampler is made anew, so that nothing is remembered but what is in ``tried``.
    """
    space: dict[str, BaseDistribution] = {f"{layer:04d}": FloatDistribution(SMALLEST, 1.0) for layer in range(layers)}
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it greets each study
    try:
        study = optuna.create_study(sampler=optuna.samplers.GPSampler(seed=seed, n_startup_trials=1))
    finally:
        optuna.logging.set_verbosity(verbosity)
    for ratios, score in tried:
        params = dict(zip(space, ratios, strict=True))
        study.add_trial(optuna.trial.create_trial(params=params, distributions=space, value=score))
    asked = study.ask(space).params
    return tuple(asked[name] for name in space)


def _one(score: Callable[[Ranks], float], ranks: Ranks) -> list[float]:
    return [score(ranks)]


def check(evaluations: int) -> None:
    """Raise ``UserError`` for settings with which no search is possible."""
    if evaluations < 1:
        raise UserError(f"evaluations must be at least 1, got {evaluations}")
