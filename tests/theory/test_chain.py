"""A model is read as the chain that it is, and one that is none is refused in a line that says why."""

import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.decomposers.svd import SVD
from spectrim.errors import UserError
from spectrim.models.resnet import ResNet
from spectrim.models.small import MLP, LeNet5
from spectrim.theory.chain import chain_of

FLAT = torch.randn(3, 4)


def read(model: nn.Module, example: Any = FLAT, decomposer: Any = None) -> Any:
    return chain_of(model, decomposer or SVD(), example)


def test_each_stage_is_a_layer_and_what_follows_it() -> None:
    model = nn.Sequential(
        OrderedDict(pool=nn.AvgPool2d(2), conv=nn.Conv2d(2, 4, 3, groups=2), act=nn.GELU(), again=nn.ELU(3.0))
    )
    model.add_module("head", nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(64, 5, bias=False)))
    chain = read(model, torch.randn(2, 2, 12, 12))
    assert chain.lead == 0.5 and [stage.name for stage in chain.stages] == ["conv", "head.2"]
    conv, head = chain.stages
    assert conv.rho == pytest.approx(1.1289041 * 3) and head.rho == 1 and head.bias == 0
    assert conv.bias == pytest.approx(math.sqrt(4 * 4) * model.conv.bias.norm().item())
    groups = torch.linalg.svdvals(model.conv.weight.double().reshape(2, 2, -1))
    torch.testing.assert_close(conv.S_R, 3 * groups.amax(0))
    torch.testing.assert_close(head.S_R, torch.linalg.svdvals(model.head[2].weight.double()))


def test_a_bias_counts_at_every_position() -> None:
    layer = nn.Linear(4, 6)
    assert read(nn.Sequential(layer), torch.randn(2, 5, 4)).stages[0].bias == pytest.approx(
        math.sqrt(5) * layer.bias.norm().item()
    )


def test_functions_count_like_modules() -> None:
    class Functional(LeNet5):
        def forward(self, x: Tensor) -> Tensor:
            x = F.avg_pool2d(F.leaky_relu(self.conv1(x), 2.0), 2, stride=2)
            x = F.max_pool2d(F.gelu(self.conv2(x), approximate="tanh"), kernel_size=3, stride=1).relu().flatten(1)
            return self.fc2(torch.tanh(self.fc1(x)))

    model = Functional()
    model.fc1 = nn.Linear(50 * 36, 500)
    chain = read(model, torch.randn(1, 1, 28, 28))
    assert [stage.rho for stage in chain.stages] == pytest.approx([2.0 * 0.5, 1.128993069 * 3, 1.0, 1.0])
    assert [stage.name for stage in read(LeNet5(), torch.randn(1, 1, 28, 28)).stages] == [
        "conv1",
        "conv2",
        "fc1",
        "fc2",
    ]


def test_the_input_norm_is_the_largest_of_any_sample_behind_what_leads() -> None:
    batches = [(torch.ones(2, 1, 4, 4), None), (torch.tensor([1.0, 3.0]).view(2, 1, 1, 1).expand(2, 1, 4, 4), None)]
    chain = read(nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 2)), batches[0][0])
    assert chain.input_norm(batches) == pytest.approx(0.5 * 3 * 4)
    with pytest.raises(UserError, match="split is empty"):
        chain.input_norm([])


def test_the_model_and_the_example_are_untouched() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Dropout())
    example = torch.full((3, 4), -1.0)
    read(model, example)
    assert example.eq(-1).all() and all(module.training for module in model.modules())


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Deciding(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > 0 else x


class Forked(Residual):
    def forward(self, x: Tensor) -> Any:
        y = self.inner(x)
        return y, y


class Scaled(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return 1000 * self.inner(x)


class Hooked(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4))
        self.register_forward_hook(lambda module, inputs, output: 2 * output)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Residual(), "branches at add"),
        (Forked(), "branches at output"),
        (Deciding(), "cannot be read as one: symbolically traced variables"),
        (Scaled(), "no Lipschitz constant is known for mul"),
        (Hooked(), "does more than call them in turn"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "no Lipschitz constant is known for BatchNorm1d"),
        (nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()), "Sigmoid does not map 0 to 0"),
        (nn.Sequential(nn.Linear(4, 4), nn.Softplus()), "Softplus does not map 0 to 0"),
        (nn.Sequential(nn.Linear(4, 4), nn.Softmax(1)), "no Lipschitz constant is known for Softmax"),
        (nn.Sequential(nn.ReLU()), "has no Linear or Conv2d"),
    ],
)
def test_what_is_no_chain_is_refused_in_one_line(model: nn.Module, message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        read(model)
    assert "\n" not in str(refusal.value)


def test_a_residual_network_is_refused() -> None:
    with pytest.raises(UserError, match="the bounds"):
        read(ResNet(20), torch.randn(1, 3, 32, 32))


def test_two_inputs_and_another_decomposer_are_refused() -> None:
    model = MLP([4], image_size=2)
    with pytest.raises(UserError, match="takes more than one tensor"):
        read(model, (FLAT, FLAT))
    with pytest.raises(UserError, match="hold for the plain SVD, not for object"):
        read(model, FLAT, object())
