"""Bayesian optimisation of ranks: it finds a known optimum, goes on after a kill, and PARS judges by a better proxy."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.algorithms.related import bayesian_search
from spectrim.algorithms.related.bayesian import Bayesian
from spectrim.algorithms.related.bayesian_search import BayesianSearch, Space
from spectrim.algorithms.related.pars import PARS
from spectrim.algorithms.shared.budget import costs_of
from spectrim.algorithms.shared.measured import Measurements
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.svd import SVD
from spectrim.errors import UserError
from spectrim.statistics.objective import Objective

EITHER: Any = [Bayesian, PARS]


def space_of(layers: int, share: float | None) -> Space:
    net = nn.Sequential(*[nn.Linear(64, 64) for _ in range(layers)])
    objective = Objective(F.cross_entropy, {"calibration": [(torch.randn(4, 64), torch.zeros(4).long())]})
    bench = Workbench.of(net, SVD(), objective)
    return Space(bench, costs_of(bench, "params"), share)


@pytest.mark.parametrize("share", [None, 0.5])
def test_finds_the_optimum_of_a_separable_cost_much_better_than_random(share: float | None) -> None:
    space = space_of(6, share)
    goal = space.ranks(np.linspace(0.15, 0.85, 6).tolist())

    def distance(ranks: dict[str, int]) -> float:
        return sum(((ranks[name] - goal[name]) / space.tops[name]) ** 2 for name in goal)

    best, log = BayesianSearch(space, 30, seed=0, state=None, identity={}).minimise(distance, "test")
    random = np.random.default_rng(0).uniform(0.01, 1, (30, 6))
    assert distance(best) == min(entry["score"] for entry in log)
    assert distance(best) < min(distance(space.ranks(vector.tolist())) for vector in random) / 5


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_every_vector_meets_the_budget_and_wastes_none_of_it(share: float) -> None:
    space = space_of(4, share)
    for vector in np.random.default_rng(0).uniform(0.01, 1, (20, 4)).tolist():
        ranks = space.ranks(vector)
        assert space.costs.achieved(ranks) <= share
        more = {name: min(rank + 1, space.tops[name]) for name, rank in ranks.items()}
        assert space.costs.achieved(more) > share


@pytest.mark.parametrize("kind", EITHER)
@pytest.mark.parametrize("budget", [{"params_kept": 0.6}, {"params_kept": None, "macs_kept": 0.6}], ids=str)
def test_the_log_tells_what_each_evaluation_gave_and_the_best_is_returned(
    kind: Any, budget: dict, net: nn.Sequential, objective: Objective
) -> None:
    result = kind(evaluations=6, **budget).compress(net, SVD(), objective)
    kept = "params_kept" if budget["params_kept"] else "macs_kept"
    assert [entry["step"] for entry in result.log] == list(range(6))
    assert all(0.4 < entry[kept] <= 0.6 for entry in result.log)
    best = min(result.log, key=lambda entry: entry["score"])
    assert getattr(result, kept) == pytest.approx(best[kept])
    lost = objective.evaluate(net).accuracy - objective.evaluate(result.model).accuracy  # type: ignore[operator]
    assert best["score"] == pytest.approx(lost)


def test_a_penalty_weighs_the_parameters_kept(net: nn.Sequential, objective: Objective) -> None:
    kept = []
    for penalty in (0.0, 100.0):
        chosen = Bayesian(params_kept=None, penalty=penalty, evaluations=8, judged_by="loss")
        result = chosen.compress(net, SVD(), objective)
        rise = objective.evaluate(result.model).loss - objective.evaluate(net).loss
        best = min(entry["score"] for entry in result.log)
        assert best == pytest.approx(rise + penalty * result.params_kept, abs=1e-5)
        kept.append(result.params_kept)
    assert kept[1] < kept[0]


class Killed(Exception):
    """What stops a search in these tests."""


@pytest.mark.parametrize("kind", EITHER)
def test_a_killed_search_goes_on_as_if_it_never_stopped(
    kind: Any, net: nn.Sequential, objective: Objective, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bayesian_search, "RANDOM", 3)
    chosen = kind(evaluations=7, params_kept=0.6, seed=3, state=str(tmp_path / "state"))
    unbroken = dataclasses.replace(chosen, state=None).compress(net, SVD(), objective)
    read = dict(objective.read)
    whole = Measurements.next

    def dies(self: Measurements, *given: Any) -> list[float]:
        row = whole(self, *given)
        if len(self.rows) == 5:
            raise Killed
        return row

    with monkeypatch.context() as patch:
        patch.setattr(Measurements, "next", dies)
        with pytest.raises(Killed):
            chosen.compress(net, SVD(), objective)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    for _ in range(2):  # the second time all is known
        objective.start_selection()
        resumed = chosen.compress(net, SVD(), objective)
        assert resumed.plan == unbroken.plan and resumed.log == unbroken.log
        assert objective.read == read


def test_the_state_of_another_search_or_of_none_is_refused(
    net: nn.Sequential, objective: Objective, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    chosen = Bayesian(evaluations=2, params_kept=0.6, state=str(state))
    chosen.compress(net, SVD(), objective)
    before = state.read_bytes()
    others: list[tuple[Any, Any]] = [
        (dataclasses.replace(chosen, seed=1), SVD()),
        (dataclasses.replace(chosen, params_kept=0.5), SVD()),
        (PARS(evaluations=2, params_kept=0.6, state=str(state)), SVD()),
        (chosen, SVD("spatial")),
    ]
    for other, decomposer in others:
        with pytest.raises(UserError, match="belongs to a training or search with other settings"):
            other.compress(net, decomposer, objective)
    with torch.no_grad():
        net[8].weight[0, 0] += 1
    with pytest.raises(UserError, match="belongs to a training or search with other settings"):
        chosen.compress(net, SVD(), objective)
    assert state.read_bytes() == before
    state.write_bytes(before[:100])
    with pytest.raises(UserError, match="truncated"):
        chosen.compress(net, SVD(), objective)


def test_the_callers_random_numbers_threads_and_loggers_are_left_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]
    settings = torch.get_num_threads(), optuna.logging.get_verbosity()
    tried = [bayesian_search.Tried((x, 1 - x), x) for x in (0.2, 0.5, 0.7)]
    assert bayesian_search.propose(tried, 2, 0) == bayesian_search.propose(tried, 2, 0)
    assert bayesian_search.propose([], 2, 0) == bayesian_search.propose([], 2, 0) != bayesian_search.propose([], 2, 1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index,union-attr]
    assert (torch.get_num_threads(), optuna.logging.get_verbosity()) == settings


def test_what_they_refuse_is_one_line(net: nn.Sequential, objective: Objective) -> None:
    for kind in EITHER:
        for bad, said in (
            ({"evaluations": 0}, "at least 1"),
            ({"params_kept": 0.0}, "must lie in"),
            ({"params_kept": 0.5, "macs_kept": 0.5}, "exactly one"),
            ({"seed": -1}, "seed"),
        ):
            with pytest.raises(UserError, match=said):
                kind(**bad)
        with pytest.raises(UserError, match="out of reach"):
            kind(params_kept=0.01).compress(net, SVD(), objective)
        squared = Objective(F.mse_loss, {"calibration": [(torch.randn(4, 3, 8, 8), torch.randn(4, 5))]})
        with pytest.raises(UserError, match="needs class scores"):
            kind().compress(net, SVD(), squared)
        assert kind(judged_by="loss", evaluations=2).compress(net, SVD(), squared).params_kept <= 0.5
    for bad in ({"penalty": 1.0}, {"params_kept": None}):
        with pytest.raises(UserError, match="exactly one of params_kept, macs_kept, milliseconds and penalty"):
            Bayesian(**bad)
    with pytest.raises(UserError, match="penalty must be at least 0"):
        Bayesian(params_kept=None, penalty=-1.0)


class Two(nn.Module):
    """Two bits, each from a layer of its own whose outputs are normalised: four classes.

    Both layers have a sixth component, the first that break-even does not allow. In ``mean`` it carries a constant, so
    that without it features are only shifted; in ``signal`` it carries the bit of half of the samples.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.mean, self.signal = (nn.Linear(12, 12, bias=False) for _ in range(2))
        self.norm = nn.BatchNorm1d(24, momentum=1.0)
        S_R = torch.tensor([8.0, 7, 6, 5, 4, 3, *[0.1] * 6])
        with torch.no_grad():
            for layer in (self.mean, self.signal):
                layer.weight.copy_(nn.init.orthogonal_(torch.empty(12, 12)) * S_R)
            features = self.norm(self.features(x))  # in training mode: the statistics are those of x
            targets = F.one_hot(y, 4) - 0.25
            self.register_buffer("read", torch.linalg.lstsq(features, targets, driver="gelsd").solution)

    def features(self, x: Tensor) -> Tensor:
        return torch.cat([self.mean(x[:, :12]), self.signal(x[:, 12:])], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.features(x)) @ self.read


def test_the_proxy_of_pars_sees_through_a_shift_of_features_that_raw_accuracy_takes_for_a_loss() -> None:
    """What PARS observes: a cut that shifts features ruins raw accuracy, and may cost nothing after a repair."""
    y = torch.arange(4).repeat(20)
    first, second = 2.0 * (y // 2) - 1, 2.0 * (y % 2) - 1
    half = torch.arange(len(y)) < len(y) // 2
    x = torch.zeros(len(y), 24)
    x[:, 0], x[:, 5] = first, 20.0
    x[half, 12], x[~half, 17] = second[half], second[~half]
    net = Two(x, y).eval()
    objective = Objective(F.cross_entropy, {"calibration": [(x, y)]})
    assert objective.evaluate(net).accuracy == 1
    proxy = PARS(params_kept=0.93, evaluations=6).compress(net, SVD(), objective)
    raw = PARS(params_kept=0.93, evaluations=6, batch_norm=False).compress(net, SVD(), objective)
    assert (set(proxy.plan), set(raw.plan)) == ({"mean"}, {"signal"})
    assert objective.evaluate(proxy.model).accuracy == 1
    repaired = raw.settle("follow", objective)  # and even so what raw accuracy chose is the worse
    assert objective.evaluate(repaired.model).accuracy <= 0.75  # type: ignore[operator]
