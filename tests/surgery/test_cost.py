"""Costs counted by hand."""

import pytest
import torch
from torch import Tensor, nn

from spectrim.factored.layers import FactoredConv2d, FactoredLinear
from spectrim.models.small import LeNet5
from spectrim.surgery.cost import Cost, layer_macs, model_cost

# 28x28 -> conv 5x5 -> 24x24 -> pool -> 12x12 -> conv 5x5 -> 8x8 -> pool -> 4x4 x 50 = 800 -> 500 -> 10
LENET_PARAMS = (20 * 25 + 20) + (50 * 20 * 25 + 50) + (500 * 800 + 500) + (10 * 500 + 10)
LENET_MACS = 24 * 24 * 20 * 25 + 8 * 8 * 50 * 20 * 25 + 800 * 500 + 500 * 10


def test_lenet5() -> None:
    assert (LENET_PARAMS, LENET_MACS) == (431_080, 2_293_000)
    assert model_cost(LeNet5(), torch.randn(64, 1, 28, 28)) == Cost(LENET_PARAMS, LENET_MACS)


def test_factored_lenet5() -> None:
    model = LeNet5()
    model.conv1 = FactoredConv2d.shaped_like(model.conv1, 2, "spatial")
    model.conv2 = FactoredConv2d.shaped_like(model.conv2, 10, "channel")
    model.fc1 = FactoredLinear.shaped_like(model.fc1, 30)
    conv1 = 28 * 24 * 2 * 5 + 24 * 24 * 20 * 2 * 5  # 1x5 first: the height is still 28
    conv2 = 8 * 8 * 10 * 20 * 25 + 8 * 8 * 50 * 10
    params = (2 * 5 + 20 * 2 * 5 + 20) + (10 * 20 * 25 + 50 * 10 + 50) + (30 * 800 + 500 * 30 + 500) + 5010
    assert model_cost(model, torch.randn(3, 1, 28, 28)) == Cost(params, conv1 + conv2 + 30 * (800 + 500) + 5000)


def test_groups_divide_the_cost() -> None:
    model = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1, groups=4, bias=False))
    assert model_cost(model, torch.randn(2, 8, 5, 5)) == Cost(12 * 2 * 9, 5 * 5 * 12 * 2 * 9)


def test_shared_parameters_count_once_and_each_use_costs() -> None:
    layer = nn.Linear(6, 6)
    assert model_cost(nn.Sequential(layer, nn.ReLU(), layer), torch.randn(4, 6)) == Cost(42, 72)


@pytest.mark.parametrize("factor", [1, 7])
def test_macs_are_of_one_input_whatever_the_batch(net: nn.Sequential, factor: int) -> None:
    assert model_cost(net, torch.randn(factor, 3, 8, 8)) == model_cost(net, torch.randn(1, 3, 8, 8))


def test_a_transformer_layer_is_counted_through() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True)
    tokens, projections = 5, 16 * 48 + 16 * 16 + 2 * 16 * 64
    macs = model_cost(layer, torch.randn(3, tokens, 16)).macs
    assert tokens * projections <= macs <= tokens * projections + 2 * tokens * tokens * 16
    assert torch.backends.mha.get_fastpath_enabled()


class TwoInputs(nn.Module):
    """Adds what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.fc(left + right)


@pytest.mark.parametrize("as_mapping", [True, False])
def test_inputs_may_be_a_tuple_or_a_mapping(as_mapping: bool) -> None:
    left, right = torch.randn(6, 4), torch.randn(6, 4)
    inputs = {"right": right, "left": left} if as_mapping else (left, right)
    assert model_cost(TwoInputs(), inputs) == Cost(15, 12)


def test_measuring_leaves_the_mode(net: nn.Sequential) -> None:
    net[1].eval()
    modes = [module.training for module in net.modules()]
    x = torch.randn(2, 3, 8, 8)
    model_cost(net, x)
    assert [module.training for module in net.modules()] == modes


class Queries(nn.Module):
    """Hands a view of a parameter to a layer, as models with learnt queries do."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 6, 8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.query.expand(len(x), -1, -1)) + x


@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_view_of_a_parameter_may_be_an_input(requires_grad: bool) -> None:
    model = Queries().requires_grad_(requires_grad)
    assert model_cost(model, torch.randn(3, 6, 5)) == Cost(6 * 8 + 8 * 5 + 5, 6 * 8 * 5)
    assert all(parameter.requires_grad == requires_grad for parameter in model.parameters())


class Counting(nn.Sequential):
    """Counts its calls, and keeps its last outputs."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += len(x)
        self.kept = super().forward(x)
        return self.kept


def test_counting_the_cost_leaves_no_trace() -> None:
    model = Counting(nn.Embedding(9, 6, max_norm=0.1), nn.Linear(6, 6))
    before = model[0].weight.detach().clone()
    assert model_cost(model, torch.tensor([[1, 2, 3]])).macs == 3 * 36
    assert model.calls == 0 and model.seen == 0 and not hasattr(model, "kept")
    assert torch.equal(model[0].weight, before)


class Recurrent(nn.Module):
    """Reads steps of shape (T, N, C), as torch does by default, or samples of shape (N, T, C)."""

    def __init__(self, batch_first: bool, kind: str) -> None:
        super().__init__()
        if kind == "attention":
            layer = nn.TransformerEncoderLayer(6, 2, 12, batch_first=batch_first)
            self.inner: nn.Module = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        else:
            self.inner = nn.GRU(6, 6, batch_first=batch_first)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        return self.head(out[0] if isinstance(out, tuple) else out)


@pytest.mark.parametrize("kind", ["attention", "recurrent"])
def test_macs_are_of_one_sample_where_steps_come_first(kind: str) -> None:
    x = torch.randn(4, 7, 6)
    samples_first = model_cost(Recurrent(True, kind), x)
    assert model_cost(Recurrent(False, kind), x.transpose(0, 1)) == samples_first
    macs, total = layer_macs(Recurrent(False, kind), ["head"], x.transpose(0, 1))
    assert macs == {"head": 7 * 6 * 3} and total <= samples_first.macs


class Swapping(Recurrent):
    """Takes samples first, and swaps for the module inside."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


def test_a_model_that_swaps_for_itself_is_counted_by_its_inputs() -> None:
    x = torch.randn(4, 7, 6)
    assert model_cost(Swapping(False, "recurrent"), x) == model_cost(Recurrent(True, "recurrent"), x)


class Forces(nn.Module):
    """Gives the gradient of an energy by its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.energy = nn.Linear(12, 32), nn.Linear(32, 6)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            return torch.autograd.grad(self.energy(self.body(x).tanh()).sum(), x)[0]


def test_a_gradient_that_a_model_takes_costs_as_the_pass_that_it_goes_back() -> None:
    """Products there belong to no layer."""
    model, x, once = Forces(), torch.randn(8, 12), 12 * 32 + 32 * 6
    assert model_cost(model, x).macs == 2 * once
    own, whole = layer_macs(model, ["body", "energy"], x)
    assert (own, whole) == ({"body": 12 * 32, "energy": 32 * 6}, 2 * once)
