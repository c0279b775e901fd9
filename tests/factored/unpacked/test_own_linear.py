"""A subclass of Linear is factored where its own forward is the product, and stays dense where it is anything else."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spectrim
from spectrim.surgery import find_layers, unpacking


def subclass(forward: Any, **attributes: Any) -> nn.Linear:
    """A layer of a class with this forward, beside attributes of the layer itself."""
    kind = type("Written", (nn.Linear,), {"forward": forward, "scale": 1.0, "doubled": lambda self, x: 2 * x})
    layer = kind(16, 12)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def without_bias() -> nn.Linear:
    return type("Bare", (nn.Linear,), {"forward": lambda self, x: x @ self.weight.T})(16, 12, bias=False)


SAME = {
    "product": lambda self, x: x @ self.weight.T + self.bias,
    "functional": lambda self, x: F.linear(x, self.weight, self.bias),
    "of the base": lambda self, x: nn.Linear.forward(self, x),
    "einsum": lambda self, input: torch.einsum("...i,oi->...o", input, self.weight) + self.bias,
    "scale of one": lambda self, x: F.linear(x, self.weight, self.bias) * self.scale,
}
OTHER = {
    "scaled": lambda self, x: self.doubled(F.linear(x, self.weight, self.bias)),
    "standardised": lambda self, x: F.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias),
    "rounded": lambda self, x: F.linear(x.bfloat16(), self.weight.bfloat16(), self.bias.bfloat16()).to(x),
    "noisy in training": lambda self, x: F.dropout(F.linear(x, self.weight, self.bias), 0.3, self.training),
    "dropped out of rows": lambda self, x: F.linear(x, self.weight, self.bias) * (x.ndim < 3),
    "two outputs": lambda self, x: (F.linear(x, self.weight, self.bias), self.bias),
    "state": lambda self, x: F.linear(x, self.weight, self.bias) + self.state.offset,
    "no bias": lambda self, x: F.linear(x, self.weight),
}


@pytest.mark.parametrize("name", SAME)
def test_a_forward_that_is_the_product_is_factored(name: str, tmp_path: Path) -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(subclass(SAME[name]), nn.ReLU(), nn.Linear(12, 5))

    model, x = net(), torch.randn(32, 16)
    x[:, 6:] = 0  # so that few components are enough
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = spectrim.compress(model, calibration=[x], decomposer=spectrim.WhitenedSVD("channel"), plan={"0.linear": 6})
    torch.testing.assert_close(result.model(x), model(x), atol=1e-5, rtol=1e-4)
    assert result.params_kept < 1 and type(model[0]).__name__ == "Written"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    result.save(tmp_path / "x.safetensors")
    assert torch.equal(spectrim.load(tmp_path / "x.safetensors", into=net())(x), result.model(x))


@pytest.mark.parametrize("name", OTHER)
def test_a_forward_that_is_anything_else_stays(name: str) -> None:
    model = nn.Sequential(subclass(OTHER[name]))
    assert unpacking.unpacked(model) is model
    assert find_layers.factorable(model, None)[1] == {"0": "Written has a forward of its own"}


@pytest.mark.parametrize(
    "layer",
    [
        subclass(SAME["scale of one"], scale=2.0),
        subclass(SAME["product"], gain=nn.Parameter(torch.ones(12))),
        subclass(SAME["product"], adapter=nn.Linear(16, 12)),
    ],
)
def test_what_the_layer_itself_holds_decides_too(layer: nn.Linear) -> None:
    model = nn.Sequential(layer)
    assert unpacking.unpacked(model) is model


def test_it_is_tried_without_a_trace() -> None:
    seen: list[Tensor] = []
    layer, state = without_bias(), torch.get_rng_state()
    layer.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    unpacked = unpacking.unpacked(nn.Sequential(layer))
    assert torch.equal(torch.get_rng_state(), state) and not seen and layer.training
    again = unpacking.pack(unpacked)
    assert type(again[0]) is type(layer) and again[0].weight is layer.weight and again[0].bias is None
