"""A layer whose class changes a step of its call stays dense, whether the model is run or not."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim
from spectrim.surgery import find_layers
from spectrim.surgery.unpacking import refusals


class Standardised(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class Called(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class ByCallImpl(nn.Linear):
    def _call_impl(self, x: Tensor) -> Tensor:
        return 2 * super()._call_impl(x)

    __call__ = _call_impl


class LookedUp(nn.Linear):
    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return 2 * value.detach() if name == "weight" else value


class OfProperty(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.__class__ = WithProperty


class WithProperty(OfProperty):
    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return 2 * self._parameters["weight"]  # type: ignore[operator]


class Named(nn.Linear):
    """A subclass that changes no step, as that of attention's output is."""

    scale = 2

    def extra_repr(self) -> str:
        return "named"


@pytest.mark.parametrize("kind", [Called, ByCallImpl, LookedUp, OfProperty, Named])
@pytest.mark.parametrize("calibrated", [True, False])
def test_a_factored_linear_layer_never_takes_the_place_of_one_that_computes_more(kind: Any, calibrated: bool) -> None:
    model, x = nn.Sequential(kind(12, 12), nn.Linear(12, 12)), torch.randn(4, 12)
    layers, left = find_layers.factorable(model, x if calibrated else None)
    assert "1" in layers and ("0" in layers) == (kind is Named)
    assert kind is Named or " of its own" in left["0"] or "computed from" in left["0"]


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_convolution_that_standardises_its_weight_stays_dense(calibrated: bool) -> None:
    model, x = nn.Sequential(Standardised(8, 8, 3), nn.Conv2d(8, 8, 3)), torch.randn(2, 8, 9, 9)
    given = {"calibration": [x]} if calibrated else {}
    result = spectrim.compress(model, algorithm=spectrim.Truncation(rank=2), **given)
    assert set(result.plan) == {"1"}
    dense = nn.Sequential(model[0], nn.Conv2d(8, 8, 3)).requires_grad_(False)
    dense[1].weight.copy_(result.model[1].weight)
    dense[1].bias.copy_(model[1].bias)
    torch.testing.assert_close(result.model(x), dense(x))


@pytest.mark.parametrize(
    ("module", "method"), [(nn.Conv1d(3, 4, 3), "_conv_forward"), (nn.TransformerEncoderLayer(8, 2, 8), "_ff_block")]
)
def test_a_module_with_a_method_of_its_own_is_not_unpacked(module: nn.Module, method: str) -> None:
    model = nn.Sequential(module)
    assert "0" not in refusals(model)
    usual = getattr(module, method)
    setattr(module, method, lambda *given: 2 * usual(*given))
    assert refusals(model)["0"] == f"{type(module).__name__} has a {method} of its own"
