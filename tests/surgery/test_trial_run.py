"""The layers at which a factored model fails are found by running it once."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim
from spectrim.decomposers.svd import SVD
from spectrim.factored.plan import RankPlan
from spectrim.surgery import replacing
from spectrim.surgery.trial_run import failing_layers


class Checked(nn.Module):
    """Asks for what only some of its layers' classes have."""

    def __init__(self, asks: str) -> None:
        super().__init__()
        self.asks = asks
        self.first, self.second, self.third = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        if self.asks == "kind":
            assert isinstance(self.second, nn.Linear), "second must be a Linear"
        if self.asks == "place" and type(self.second) is not nn.Linear:
            raise KeyError("second")
        return self.third(self.second(self.first(x)))


def refuses_factors(module: nn.Module, *_: Any) -> None:
    if type(module) is not nn.Linear:
        raise LookupError("this hook knows Linear alone")


def test_a_hook_that_fails_leaves_its_layer_dense() -> None:
    model, x = Checked(""), torch.randn(4, 16)
    model.second.register_forward_hook(refuses_factors)
    result = spectrim.compress(model, calibration=[x], algorithm=spectrim.Truncation(rank=3))
    assert list(result.plan) == ["first", "third"]
    reason = "second: left dense: the model fails with it factored: this hook knows Linear alone"
    assert any(note.startswith(reason) for note in result.notes)
    assert result.model(x).shape == (4, 16)


@pytest.mark.parametrize("asks", ["kind", "place"])
def test_where_no_layer_was_running_those_of_the_module_are_named(asks: str) -> None:
    model, x = nn.Sequential(Checked(asks), nn.Linear(16, 16)), torch.randn(4, 16)
    with torch.no_grad():
        result = spectrim.compress(model, calibration=[x], algorithm=spectrim.Truncation(rank=3))
    assert list(result.plan) == ["1"] and len(result.notes) == 3
    assert all(note.startswith("0.") and "the model fails with it factored" in note for note in result.notes)


def test_a_model_that_runs_has_no_failing_layer() -> None:
    model, x = Checked(""), torch.randn(4, 16)
    spectra = {"second": SVD().spectrum(model.second)}
    factored = replacing.apply(model, RankPlan.of({"second": spectra["second"].kept(2)}), spectra)
    assert failing_layers(factored, ["second"], x) == {}


def test_a_search_does_not_meet_the_failing_layer(net: nn.Sequential, batches: Any) -> None:
    net[8].register_forward_pre_hook(refuses_factors)
    for algorithm in ("joint", spectrim.Compact(verified=True, gamma=None), "sensitivity", spectrim.RankSelection()):
        result = spectrim.compress(net, calibration=batches, verification=batches, algorithm=algorithm)
        assert "8" not in result.plan and any(note.startswith("8: left dense") for note in result.notes)
