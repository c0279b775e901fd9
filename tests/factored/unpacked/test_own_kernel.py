"""A subclass of Conv2d is factored where its forward convolves with a kernel of its own, and stays dense otherwise."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spectrim
from spectrim.errors import UserError
from spectrim.factored.unpacked.own_kernel import UnpackedOwnKernel, kernel_of
from spectrim.surgery import find_layers, unpacking


def standardised(conv: Any) -> Tensor:
    """The kernel of weight standardisation (Qiao et al., arXiv 1903.10520)."""
    flat = conv.weight.flatten(1)
    flat = (flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + 1e-5)
    return flat.view_as(conv.weight)


def convolved(conv: Any, x: Tensor, kernel: Tensor) -> Tensor:
    return F.conv2d(x, kernel, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


class Gained(nn.Conv2d):
    """Standardised weights with a gain a filter, as in NFNet."""

    def __init__(self, *sizes: int, **settings: Any) -> None:
        super().__init__(*sizes, **settings)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return convolved(self, x, standardised(self) * self.gain)


FORWARDS = {
    "standardised": lambda self, x: convolved(self, x, standardised(self)),
    "of the base": lambda self, x: nn.Conv2d.forward(self, x),
    "by a method of the base": lambda self, x: self._conv_forward(x, self.weight.tanh(), self.bias),
    "by keywords": lambda self, x: F.conv2d(
        input=x, weight=2 * self.weight, bias=self.bias, padding=1, stride=self.stride, groups=self.groups
    ),
}
OTHER = {
    "pads": lambda self, x: F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias),
    "activates": lambda self, x: convolved(self, x, self.weight).relu(),
    "twice": lambda self, x: convolved(self, convolved(self, x, self.weight), self.weight),
    "other stride": lambda self, x: F.conv2d(x, self.weight, self.bias, 2, self.padding),
    "no bias": lambda self, x: F.conv2d(x, self.weight, None, self.stride, self.padding),
    "of its input": lambda self, x: convolved(self, x, self.weight * x.mean()),
    "of the mode": lambda self, x: convolved(self, x, self.weight * (2 if self.training else 1)),
    "random": lambda self, x: convolved(self, x, F.dropout(self.weight)),
    "scaled": lambda self, x: 2 * convolved(self, x, self.weight),
    "fails": lambda self, x: self.missing(x),
}


def subclass(forward: Any, channels: int = 8, **settings: Any) -> nn.Conv2d:
    return type("Written", (nn.Conv2d,), {"forward": forward})(channels, 8, 3, padding=1, **settings)


def net(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 1), layer, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def _cut(W_OI: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(W_OI, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


@pytest.mark.parametrize("make", [*FORWARDS, Gained])
@pytest.mark.parametrize("settings", [{}, {"bias": False}, {"groups": 2, "stride": 2}])
def test_a_layer_with_a_kernel_of_its_own_is_factored(make: Any, settings: Any, tmp_path: Path) -> None:
    def written() -> nn.Sequential:
        layer = Gained(8, 8, 3, padding=1, **settings) if make is Gained else subclass(FORWARDS[make], **settings)
        return net(layer).eval()

    model, x, groups = written(), torch.randn(6, 3, 7, 7), settings.get("groups", 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kernel = kernel_of(model[1])
    result = spectrim.compress(model, plan={"1.conv": 2}, decomposer=spectrim.SVD("channel"))
    assert kernel is not None
    cut = torch.cat([_cut(own.flatten(1), 2) for own in kernel.detach().chunk(groups)]).view_as(kernel)
    middle = model[0](x)
    expected = model[2:](F.conv2d(middle, cut, model[1].bias, model[1].stride, 1, 1, groups))
    torch.testing.assert_close(result.model(x), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(convolved(model[1], middle, kernel), model[1](middle))
    assert type(model[1]) is not UnpackedOwnKernel
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    result.save(tmp_path / "x.safetensors")
    assert torch.equal(spectrim.load(tmp_path / "x.safetensors", into=written())(x), result.model(x))


def test_a_budget_is_met_and_a_layer_that_stays_dense_comes_back() -> None:
    model, data = net(Gained(8, 8, 3, padding=1)).eval(), [(torch.randn(16, 3, 7, 7), torch.randint(0, 5, (16,)))]
    result = spectrim.compress(model, calibration=data, params_kept=0.7)
    counts = [sum(own.numel() for own in one.parameters()) for one in (result.model, model)]
    assert result.params_kept == pytest.approx(counts[0] / counts[1]) and counts[0] <= 0.7 * counts[1]
    assert not any("is not factored" in note for note in result.notes)
    left = spectrim.compress(model, calibration=data, params_kept=0.96, exclude=["1.conv"]).model
    assert type(left[1]) is Gained and left.state_dict().keys() >= {"1.weight", "1.bias", "1.gain"}
    assert torch.equal(left[1].weight, model[1].weight)


@pytest.mark.parametrize("name", OTHER)
def test_any_other_forward_stays_dense(name: str) -> None:
    model = net(subclass(OTHER[name]))
    opened = unpacking.unpacked(model)
    layers, left = find_layers.factorable(opened, None)
    assert opened is model and "1" not in layers and "has a forward of its own" in left["1"]


def test_padding_that_is_no_zeros_and_buffers_stay_dense() -> None:
    assert kernel_of(subclass(FORWARDS["of the base"], padding_mode="reflect")) is None
    masked = subclass(FORWARDS["standardised"])
    masked.register_buffer("mask", torch.ones(3))
    assert kernel_of(masked) is None and kernel_of(nn.Conv2d(3, 8, 3)) is None


def test_a_kernel_that_was_trained_apart_is_not_lost() -> None:
    opened: Any = unpacking.unpacked(net(Gained(8, 8, 3, padding=1)))
    opened[1].conv.weight.data.add_(0.1)
    with pytest.raises(UserError, match="Gained computes its kernel in each pass, .* name the layer in exclude="):
        unpacking.pack(opened)
