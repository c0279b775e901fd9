"""Each layer takes the smallest rank within one tolerance, alone; a budget finds the tolerance."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from spectrim.algorithms.related.layer_threshold import LayerThreshold
from spectrim.algorithms.truncation import rank_of_energy
from spectrim.decomposers.spectrum import spectrum_of
from spectrim.decomposers.svd import SVD
from spectrim.errors import UserError
from spectrim.statistics.objective import Objective


@pytest.fixture
def net(net: nn.Sequential, batches: Any) -> nn.Sequential:
    """The tiny net after some training, so that its layers matter."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for inputs, targets in 8 * batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), targets).backward()
        optimizer.step()
    return net


def ranks(result: Any) -> dict[str, int]:
    """Of every layer; a dense one keeps all."""
    return {row.layer: row.full_rank if row.rank is None else int(row.rank) for row in rows(result)}


def rows(result: Any) -> Any:
    report = result.report.astype({"rank": object})
    return report.where(report.notna(), None).itertuples()


@pytest.mark.parametrize("judged_by", ["accuracy", "loss"])
def test_a_smaller_tolerance_never_keeps_less_of_any_layer(
    judged_by: Any, net: nn.Sequential, objective: Objective
) -> None:
    found = [
        ranks(
            LayerThreshold(params_kept=None, tolerance=tolerance, judged_by=judged_by).compress(net, SVD(), objective)
        )
        for tolerance in (0.0, 0.003, 0.03, 1e9)
    ]
    assert all(one[name] >= other[name] for one, other in pairwise(found) for name in one)
    assert found[0] != found[-1]
    for name in found[-1]:  # any tolerance: the least of the energies
        assert found[-1][name] == rank_of_energy(spectrum_of(net.get_submodule(name), SVD()), 0.3)


def test_each_layer_takes_the_last_rank_before_it_loses_too_much(net: nn.Sequential, objective: Objective) -> None:
    tolerance = 0.002
    chosen = LayerThreshold(params_kept=None, tolerance=tolerance, judged_by="loss")
    result = chosen.compress(net, SVD(), objective)
    dense, kept = objective.evaluate(net).loss, ranks(result)
    for entry in result.log:  # measured with the other layers dense
        alone = nn.Sequential(*net)
        alone[int(entry["layer"])] = spectrum_of(net.get_submodule(entry["layer"]), SVD()).factor(entry["rank"])
        assert objective.evaluate(alone).loss - dense == pytest.approx(entry["score"], abs=1e-6)
        assert (entry["score"] <= tolerance) == (entry["rank"] >= kept[entry["layer"]])
    assert [entry["step"] for entry in result.log] == list(range(len(result.log)))


@pytest.mark.parametrize("budget", [{"params_kept": 0.6}, {"params_kept": None, "macs_kept": 0.6}], ids=str)
def test_a_budget_is_met_by_the_least_tolerance_without_measuring_twice(
    budget: dict[str, Any], net: nn.Sequential, objective: Objective
) -> None:
    result = LayerThreshold(judged_by="loss", **budget).compress(net, SVD(), objective)
    assert (result.params_kept if budget["params_kept"] else result.macs_kept) <= 0.6
    measured = [(entry["layer"], entry["rank"]) for entry in result.log]
    assert len(set(measured)) == len(measured)
    scores = {(entry["layer"], entry["rank"]): entry["score"] for entry in result.log}
    used = max(
        score for (name, rank), score in scores.items() if name in result.plan and rank >= result.plan[name].rank
    )
    stricter = max(score for score in scores.values() if score < used)
    other = LayerThreshold(params_kept=None, tolerance=max(0.0, stricter), judged_by="loss")
    cut = other.compress(net, SVD(), objective)
    assert (cut.params_kept if budget["params_kept"] else cut.macs_kept) > 0.6


def test_what_it_refuses_is_one_line(net: nn.Sequential, objective: Objective) -> None:
    for bad, said in (
        ({"tolerance": 0.1}, "exactly one of params_kept, macs_kept, milliseconds and tolerance"),
        ({"params_kept": None}, "exactly one of params_kept, macs_kept, milliseconds and tolerance"),
        ({"params_kept": None, "tolerance": -0.1}, "tolerance must be at least 0"),
        ({"energies": (0.5, 1.0)}, "energies must lie in"),
        ({"energies": ()}, "energies must lie in"),
    ):
        with pytest.raises(UserError, match=said):
            LayerThreshold(**bad)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="out of reach of this rule"):
        LayerThreshold(params_kept=0.2, energies=(0.9,)).compress(net, SVD(), objective)
    squared = Objective(nn.functional.mse_loss, {"calibration": [(torch.randn(4, 3, 8, 8), torch.randn(4, 5))]})
    with pytest.raises(UserError, match="needs class scores"):
        LayerThreshold().compress(net, SVD(), squared)


def test_another_budget_takes_no_measurement_again(net: nn.Module, objective: Objective) -> None:
    first = LayerThreshold(params_kept=0.6).compress(net, SVD(), objective)
    before = sum(objective.read.values())
    again = LayerThreshold(params_kept=0.4).compress(net, SVD(), objective)
    read = sum(objective.read.values()) - before
    assert len(again.log) == len(first.log) > 10 and again.params_kept < first.params_kept
    apart = Objective(objective.loss, objective.splits)
    fresh = LayerThreshold(params_kept=0.4).compress(copy.deepcopy(net), SVD(), apart)
    assert fresh.plan == again.plan and fresh.log == again.log
    assert read < sum(apart.read.values()) / 3
