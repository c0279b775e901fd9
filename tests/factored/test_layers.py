"""A factored layer computes the product of its factors, in the place, precision and shape of the dense one."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.factored.forms import Form
from spectrim.factored.layers import FactoredConv2d, FactoredLinear, TuckerConv2d


def filled(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def test_linear_is_the_product_of_its_factors() -> None:
    layer = filled(FactoredLinear(7, 5, 2))
    product = layer.second.weight @ layer.first.weight
    x = torch.randn(3, 4, 7)
    torch.testing.assert_close(layer(x), x @ product.T + layer.second.bias)
    torch.testing.assert_close(layer(input=x), layer(x))


@pytest.mark.parametrize("bias", [True, False])
def test_linear_holds_rank_times_both_sides(bias: bool) -> None:
    layer = FactoredLinear.shaped_like(nn.Linear(7, 5, bias), 2)
    assert sum(p.numel() for p in layer.parameters()) == 2 * (7 + 5) + 5 * bias


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_hold_rank_times_the_cost_of_their_view(groups: int) -> None:
    dense = nn.Conv2d(8, 6, (3, 5), groups=groups)
    channel, spatial = (FactoredConv2d.shaped_like(dense, 2, view) for view in ("channel", "spatial"))
    inputs, outputs = 8 // groups, 6 // groups
    assert sum(p.numel() for p in channel.parameters()) == 2 * groups * (outputs + inputs * 3 * 5) + 6
    assert sum(p.numel() for p in spatial.parameters()) == 2 * groups * (outputs * 3 + inputs * 5) + 6
    assert channel.rank == spatial.rank == 2


@pytest.mark.parametrize("groups", [1, 2])
def test_tucker_holds_both_sides_and_the_core(groups: int) -> None:
    dense = nn.Conv2d(8, 6, (3, 5), groups=groups)
    layer = TuckerConv2d.shaped_like(dense, outputs=2, inputs=3)
    inputs, outputs = 8 // groups, 6 // groups
    assert sum(p.numel() for p in layer.parameters()) == groups * (3 * inputs + 2 * 3 * 3 * 5 + 2 * outputs) + 6


DENSE: dict[str, Any] = {
    "linear": lambda: nn.Linear(12, 10),
    "linear in 3": lambda: nn.Linear(12, 10, bias=False),
    "channel": lambda: nn.Conv2d(8, 6, (3, 5), stride=(1, 2), padding=(2, 1), groups=2),
    "channel in 2": lambda: nn.Conv2d(8, 6, 3, padding="same", groups=2),
    "spatial": lambda: nn.Conv2d(8, 6, (3, 5), padding=1, dilation=(2, 1), padding_mode="reflect"),
    "spatial in 4": lambda: nn.Conv2d(8, 6, (3, 2), bias=False, groups=2),
    "vertical": lambda: nn.Conv2d(8, 6, (3, 5), groups=2),
    "tucker 2x3": lambda: nn.Conv2d(8, 6, (3, 5), stride=2, groups=2),
    "pivoted linear": lambda: nn.Linear(12, 10),
    "pivoted channel": lambda: nn.Conv2d(8, 6, (3, 5), stride=(1, 2), padding=(2, 1), groups=2),
    "pivoted spatial": lambda: nn.Conv2d(8, 6, (3, 5), padding=1, dilation=(2, 1), padding_mode="reflect"),
    "embedding": lambda: nn.Embedding(9, 4, padding_idx=2),
    "pivoted embedding but 3": lambda: nn.Embedding(9, 4),
    "embedding but 3": lambda: nn.Embedding(9, 4),
}


def factored(form: str, dense: nn.Module) -> Any:
    layer: Any = filled(Form.from_text(form).layer_for(dense, 2))
    if hasattr(layer, "place"):
        layer.place.copy_(torch.randperm(9))
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", DENSE)
def test_weight_and_bias_are_those_of_the_dense_layer_that_computes_the_same(form: str, dtype: torch.dtype) -> None:
    dense: Any = DENSE[form]().to(dtype)
    layer = factored(form, dense)
    assert layer.weight.shape == dense.weight.shape and layer.weight.dtype == dtype
    assert (layer.bias is None) == (getattr(dense, "bias", None) is None)
    dense.weight = nn.Parameter(layer.weight.detach())
    if layer.bias is not None:
        dense.bias = layer.bias
    x = torch.randn(2, 8, 11, 12, dtype=dtype) if isinstance(dense, nn.Conv2d) else torch.randn(3, 12, dtype=dtype)
    x = torch.arange(9) if isinstance(dense, nn.Embedding) else x
    torch.testing.assert_close(layer(x), dense(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", DENSE)
def test_what_is_put_together_under_autocast_keeps_every_digit(form: str) -> None:
    layer = factored(form, DENSE[form]())
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = layer.dense_again(), layer.plain_module()
    assert found.weight.dtype == torch.float32 and found.weight.equal(layer.weight)
    assert all(value.equal(layer.plain_module().state_dict()[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("form", DENSE)
def test_the_weight_has_a_gradient_in_every_factor_and_is_no_state(form: str) -> None:
    layer = factored(form, DENSE[form]())
    layer.weight.square().sum().backward()
    assert all(factor.weight.grad.abs().sum() > 0 for factor in layer.factors)
    assert "weight" not in layer.state_dict() and "weight" not in dict(layer.named_parameters())


@pytest.mark.parametrize("form", DENSE)
def test_the_settings_of_the_dense_layer_are_read_under_their_names(form: str) -> None:
    dense = DENSE[form]()
    layer = factored(form, dense)
    settings = [name for name in vars(dense) if not name.startswith("_") and name != "training"]
    assert len(settings) >= 2 and {name: getattr(layer, name) for name in settings} == {
        name: getattr(dense, name) for name in settings
    }
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        layer.nothing  # noqa: B018


class Sub(nn.Linear):
    """A linear layer with members of every kind."""

    constant = 3

    def __init__(self) -> None:
        super().__init__(12, 10)
        self.gain = 2.0

    @property
    def doubled(self) -> float:
        return 2 * self.gain

    def penalty(self) -> Tensor:
        return self.gain * self.weight.square().sum()

    @staticmethod
    def halved(x: float) -> float:
        return x / 2


def test_the_members_of_a_subclass_are_read_from_the_factored_layer() -> None:
    layer = factored("linear", Sub())
    for one in (layer, copy.deepcopy(layer)):
        assert (one.gain, one.constant, one.doubled, one.halved(3.0)) == (2.0, 3, 4.0, 1.5)
        torch.testing.assert_close(one.penalty(), 2 * one.weight.square().sum())
    assert not hasattr(layer, "reset_parameters")  # those of torch would work on a weight that is no parameter


class Reader(nn.Module):
    """Pads by the kernel of its layer and multiplies by its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer: Any = nn.Conv2d(8, 6, (3, 5), groups=2)

    def forward(self, x: Tensor) -> Tensor:
        size = self.layer.kernel_size[0] // 2
        return self.layer(F.pad(x, (size,) * 4)) + self.layer.weight.sum()


@pytest.mark.parametrize("form", ["channel", "spatial", "tucker 2x3", "pivoted channel", "pivoted spatial"])
def test_a_model_that_reads_them_is_compiled_and_exported(form: str) -> None:
    model, x = Reader(), torch.randn(2, 8, 9, 9)
    model.layer = factored(form, model.layer)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize(
    "form", ["linear", "spatial", "tucker 2x3", "pivoted linear", "pivoted channel", "pivoted spatial"]
)
def test_a_factored_layer_is_scripted(form: str) -> None:
    layer = factored(form, DENSE[form]())
    with pytest.warns(DeprecationWarning):
        scripted = torch.jit.script(layer)
    x = torch.randn(2, 8, 9, 9) if "lin" not in form else torch.randn(2, 12)
    torch.testing.assert_close(scripted(x), layer(x))
