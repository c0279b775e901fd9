"""A budget in milliseconds, by a clock that counts: met from below, and no layer is left in a slower form."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from spectrim.algorithms.joint import Joint
from spectrim.algorithms.related.global_threshold import GlobalThreshold
from spectrim.algorithms.related.knapsack import Knapsack
from spectrim.algorithms.related.sensitivity import Sensitivity
from spectrim.algorithms.shared.budget import costs_of
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.svd import SVD
from spectrim.errors import UserError
from spectrim.factored.layers import FactoredConv2d, FactoredLinear
from spectrim.statistics.objective import Objective
from spectrim.surgery import latency
from spectrim.surgery.cost import model_cost

CALL = 3.0  # of each Linear or Conv2d, whatever its size
SELECTORS: Any = [Joint, Knapsack, Sensitivity, GlobalThreshold]


def counted(module: nn.Module, inputs: Any) -> float:
    """Milliseconds: a thousandth for each MAC of each sample, and ``CALL`` for each layer; but nothing gains in 3."""
    x = inputs[0] if isinstance(inputs, tuple) else inputs
    layers = [one for one in module.modules() if isinstance(one, nn.Linear | nn.Conv2d)]
    slow = 100.0 if isinstance(module, nn.Module) and x.shape[1:] == (12, 8, 8) and len(layers) > 1 else 0.0
    return len(x) * model_cost(module, inputs).macs / 1000 + CALL * len(layers) + slow


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "milliseconds", counted)


@pytest.fixture
def compress(net: nn.Sequential, objective: Objective) -> Callable[..., Compressed]:
    def of(selector: Any, milliseconds: float, **given: Any) -> Compressed:
        more = {"samples": 30} if selector is Joint else {"params_kept": None}
        chosen = selector(milliseconds=milliseconds, **more, **given)
        return chosen.compress(net, SVD("spatial"), objective)

    return of


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("share", [0.8, 0.6])
def test_the_budget_is_met_and_no_layer_is_slower_than_dense(
    selector: Any, share: float, compress: Callable[..., Compressed], net: nn.Sequential
) -> None:
    x = torch.randn(4, 3, 8, 8)
    target = share * counted(net, x)
    result = compress(selector, target, batch_size=4)
    assert result.plan and (0.4 if selector is not Sensitivity else 0) * target < counted(result.model, x)
    assert counted(result.model, x) <= target * (1 + 1e-6)
    assert "3" not in result.plan  # which is slower in two layers than in one, at any rank
    (note,) = [note for note in result.notes if "measured at batch size 4" in note]
    assert "no rank is faster than dense in 1 of 4 layers: 3" in note or "of 4 layers: 3, 8" in note


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_budget_that_the_dense_model_meets_leaves_it_dense(
    selector: Any, compress: Callable[..., Compressed]
) -> None:
    result = compress(selector, 1e9)
    assert not result.plan and result.params_kept == 1


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_model_that_is_no_faster_as_a_whole_is_left_dense(
    selector: Any, compress: Callable[..., Compressed], net: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    def between_layers(module: nn.Module, inputs: Any) -> float:
        factored = [one for one in module.modules() if isinstance(one, FactoredLinear | FactoredConv2d)]
        return counted(module, inputs) + 1e6 * (isinstance(module, nn.Sequential) and len(factored))

    monkeypatch.setattr(latency, "milliseconds", between_layers)
    result = compress(selector, 0.8 * counted(net, torch.randn(4, 3, 8, 8)), batch_size=4)
    assert not result.plan and result.params_kept == 1 and result.report["rank"].isna().all()
    assert any("no faster as a whole" in note for note in result.notes)
    x = torch.randn(2, 3, 8, 8)
    assert result.model(x).equal(net(x))


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_budget_out_of_reach_says_what_remains(selector: Any, compress: Callable[..., Compressed]) -> None:
    with pytest.raises(UserError, match=r"^milliseconds=0.1 is out of reach: at rank 1 [\d.]+ ms remain$"):
        compress(selector, 0.1)


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"milliseconds": 0.0}, "milliseconds must be above 0"),
        ({"milliseconds": 1.0, "batch_size": 0}, "batch_size must be at least 1"),
        ({"milliseconds": 1.0, "macs_kept": 0.5}, "exactly one of"),
    ],
)
def test_bad_settings_are_one_line(selector: Any, given: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        selector(**({} if selector is Joint else {"params_kept": None}) | given)


def test_the_time_of_the_whole_model_is_the_layers_and_what_is_outside(
    net: nn.Sequential, objective: Objective
) -> None:
    costs = costs_of(Workbench.of(net, SVD(), objective), "milliseconds", 2)
    assert costs.total == pytest.approx(counted(net, torch.randn(2, 3, 8, 8)))
    assert costs.dense["6"] == pytest.approx(counted(net[6], torch.randn(2, 256)))
    assert float(costs.curves["6"][1]) < costs.dense["6"] <= float(costs.curves["6"][-1])
