"""Search the ranks of all layers at once by Bayesian optimisation, for ``Bayesian`` and ``PARS``.

A Gaussian process models the score as a function of one rank ratio per layer. Each new vector of ratios is the one with
the largest expected improvement on the best score so far. Optuna's ``GPSampler`` does both.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

from spectrim.algorithms.shared.budget import Costs
from spectrim.algorithms.shared.measured import Measurements
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.errors import UserError
from spectrim.tools import extras
from spectrim.tools.live import Bar

RANDOM = 10  # vectors that are tried before the Gaussian process proposes one
SMALLEST = 0.01  # the least ratio of a layer: a common factor of 1 / SMALLEST makes every layer dense again

Ranks = dict[str, int]


class Tried(NamedTuple):
    """Pair a vector of rank ratios, one per layer in [``SMALLEST``, 1], with the score of the ranks it stands for."""

    ratios: tuple[float, ...]
    score: float


@dataclass(frozen=True)
class Space:
    """Map vectors of ratios to ranks that always meet the budget, so that no evaluation is wasted.

    The ratio 1 stands for one rank above break-even, at which a layer stays dense.

    ``requested``: the part of the dense model's cost to keep. The largest common factor on all ratios meets it from
        below. None: the ratios are not scaled.
    """

    bench: Workbench
    costs: Costs
    requested: float | None

    @cached_property
    def tops(self) -> Ranks:
        """Return the rank that ratio 1 stands for, by layer."""
        return {name: spectrum.break_even + 1 for name, spectrum in self.bench.spectra.items()}

    def ranks(self, ratios: Sequence[float]) -> Ranks:
        """Return the rank of every layer. Raises ``UserError`` for a budget out of reach."""

        def scaled(factor: float) -> Ranks:
            pairs = zip(self.tops.items(), ratios, strict=True)
            return {name: min(top, max(1, round(factor * ratio * top))) for (name, top), ratio in pairs}

        if self.requested is None:
            return scaled(1.0)
        met = self.costs.meet(self.requested, scaled, 0.0, 1 / SMALLEST)
        return {name: min(top, met[name]) for name, top in self.tops.items()}

    def alike(self, ratios: tuple[float, ...], ranks: Mapping[str, int]) -> list[tuple[float, ...]]:
        """Return the vectors that share one score: the one tried and, after a budget scaled it, that of its ``ranks``.

        The Gaussian process gets both. It then learns from fewer evaluations that only the direction of a vector
        counts.
        """
        moved = tuple(max(SMALLEST, ranks[name] / top) for name, top in self.tops.items())
        return [ratios] if self.requested is None else [ratios, moved]


@dataclass(frozen=True)
class BayesianSearch:
    """Search for the rank ratios of all layers with the lowest score.

    The first vector has the ratio 1/2 in every layer. The next ``RANDOM`` - 1 vectors are random. Each later one has
    the largest expected improvement, or is random if the ranks of that one were measured before. A vector depends on
    the vectors before it and on ``seed`` alone, so a resumed search equals an unbroken one.

    ``evaluations``: the number of vectors.
    ``state``: the file from which an interrupted search is resumed. None: the search starts anew.
    ``identity``: what tells this search from another.
    """

    space: Space
    evaluations: int
    seed: int
    state: str | None
    identity: Mapping[str, Any]

    def minimise(self, score: Callable[[Ranks], float], label: str) -> tuple[Ranks, list[dict]]:
        """Return the ranks with the lowest ``score``, and a log with one entry per vector.

        An entry holds the step, the score, the part of the cost that is kept, and ``measured``: false if an earlier
        vector stood for the same ranks. Raises ``UserError`` for a budget out of reach, and for a state that is cut
        short or belongs to another search.
        """
        known: dict[tuple[int, ...], float] = {}
        told: list[Tried] = []
        log: list[dict] = []
        costs, read = self.space.costs, self.space.bench.objective.read
        with Measurements.opened(self.state, self.identity, read) as scores:
            bar = Bar(range(self.evaluations), label, unit="model", leave=False)
            for step in bar:
                ratios = self._propose(step, told, known)
                ranks = self.space.ranks(ratios)
                key = tuple(ranks.values())
                measured = key not in known
                if measured:
                    known[key] = scores.next(key, partial(_one, score, ranks))[0]
                told += [Tried(vector, known[key]) for vector in self.space.alike(ratios, ranks)]
                kept = {f"{costs.measure}_kept": costs.achieved(ranks)}
                log.append({"step": step, "score": known[key], **kept, "measured": measured})
                bar.tell({**log[-1], "best": min(known.values())})
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
    """Return the vector with the largest expected improvement on ``tried``, or a random one if it is empty.

    The sampler is made anew in each call, so that it knows nothing but ``tried``.
    """
    import optuna  # here, because it is an extra

    Distributions = dict[str, optuna.distributions.BaseDistribution]
    space: Distributions = {
        f"{layer:04d}": optuna.distributions.FloatDistribution(SMALLEST, 1.0) for layer in range(layers)
    }
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # it logs a line for each study
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


def check_search(evaluations: int) -> None:
    """Raise ``UserError`` for settings that no search can use, and where optuna is not installed."""
    extras.imported("optuna", "search", "a Bayesian search")
    if evaluations < 1:
        raise UserError(f"evaluations must be at least 1, got {evaluations}")
