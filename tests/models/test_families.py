"""The families for small images: parameters counted by hand, depths that do not exist."""

import pytest
import torch
from torch import nn

from spectrim.models.densenet import DenseNet
from spectrim.models.resnet import ResNet
from spectrim.models.resnext import ResNeXt
from spectrim.models.small import MLP, BiasFreeMLP, LeNet5
from spectrim.models.vgg import VGG


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_resnet20() -> None:
    def stage(first: int, width: int) -> int:  # six 3x3 convolutions, each with scale and shift
        return 9 * (first * width + 5 * width * width) + 6 * 2 * width

    stem, head = 9 * 3 * 16 + 2 * 16, 64 * 10 + 10
    assert count(ResNet(20)) == stem + stage(16, 16) + stage(16, 32) + stage(32, 64) + head == 269_722


def test_lenet5() -> None:
    convolutions = (25 * 20 + 20) + (25 * 20 * 50 + 50)
    linears = (4 * 4 * 50 * 500 + 500) + (500 * 10 + 10)
    assert count(LeNet5()) == convolutions + linears == 431_080


def test_mlp() -> None:
    assert count(MLP([64, 64], in_channels=1, image_size=8)) == (64 * 64 + 64) * 2 + 64 * 10 + 10


@pytest.mark.parametrize(("depth", "parameters"), [(1, 64 * 10), (2, 64 * 32 + 320), (5, 64 * 32 + 3 * 32 * 32 + 320)])
def test_bias_free_mlp(depth: int, parameters: int) -> None:
    model = BiasFreeMLP(depth, 32, image_size=8)
    assert count(model) == parameters
    assert sum(isinstance(module, nn.ReLU) for module in model) == depth - 1
    assert not model(torch.zeros(1, 1, 8, 8)).any()


def test_vgg19() -> None:
    widths = [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8
    convolutions = sum(9 * before * after + 2 * after for before, after in zip([3, *widths], widths, strict=False))
    assert count(VGG(19)) == convolutions + 512 * 10 + 10


def test_densenet40_ends_in_the_channels_of_three_blocks() -> None:
    first = 16 + 12 * 12
    second = first // 2 + 12 * 12
    assert DenseNet(40).fc.in_features == second // 2 + 12 * 12


def test_resnext_groups_its_3x3_convolutions() -> None:
    grouped = [module for module in ResNeXt(29, 8, 4).modules() if isinstance(module, nn.Conv2d) and module.groups > 1]
    assert {module.groups for module in grouped} == {8}
    assert [module.in_channels // module.groups for module in grouped] == [4] * 3 + [8] * 3 + [16] * 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNet(21), "6n.2"),
        (lambda: ResNet(2), "6n.2"),
        (lambda: ResNeXt(28, 8, 4), "9n.2"),
        (lambda: DenseNet(23), "3n.4"),
        (lambda: DenseNet(22, compression=0), "compression"),
        (lambda: VGG(12), "depth of a VGG"),
        (lambda: VGG(11, width=0), "width of a VGG"),
        (lambda: LeNet5(image_size=12), "at least 16x16"),
        (lambda: MLP([]), "hidden layer"),
        (lambda: BiasFreeMLP(0), "at least one layer and one unit"),
        (lambda: BiasFreeMLP(2, 0), "at least one layer and one unit"),
    ],
)
def test_shapes_that_do_not_exist(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


def test_residual_shortcut_keeps_the_input_where_the_branch_is_silent() -> None:
    block = ResNet(20).layer2[0].eval()
    for bn in (block.bn1, block.bn2):
        nn.init.zeros_(bn.weight)
    x = torch.rand(1, 16, 8, 8)
    out = block(x)
    assert out[:, 8:24].equal(x[:, :, ::2, ::2])
    assert out[:, :8].abs().sum() == out[:, 24:].abs().sum() == 0
