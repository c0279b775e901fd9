"""Blocks are found where a model repeats them, and their outputs are compared."""

import pytest
import torch
from torch import Tensor, nn

from spectrim import compress
from spectrim.batches import evaluating
from spectrim.models.resnet import ResNet
from spectrim.refit.blocks import block_error, outputs_of, repeated_blocks


def cut(net: nn.Module, *names: str) -> nn.Module:
    return compress(net, plan=dict.fromkeys(names, 2)).model


def test_residual_blocks_are_found_and_a_block_that_stays_dense_is_not() -> None:
    net = ResNet(14, width=4)
    model = cut(net, "layer1.0.conv1", "layer1.1.conv1", "layer3.0.conv2", "conv1")
    assert repeated_blocks(model, net) == ["layer1.0", "layer1.1", "layer3.0"]


def test_only_the_outermost_blocks_are_taken() -> None:
    class Block(nn.Module):
        def __init__(self, *inner: nn.Module) -> None:
            super().__init__()
            self.inner = nn.Sequential(*inner)

    net = nn.Sequential(*(Block(Block(nn.Linear(9, 9)), Block(nn.Linear(9, 9))) for _ in range(2)))
    model = cut(net, "0.inner.0.inner.0", "1.inner.1.inner.0")
    assert repeated_blocks(model, net) == ["0", "1"]
    assert repeated_blocks(model[0], net[0]) == ["inner.0"]  # type: ignore[index]


def test_the_layers_of_a_perceptron_are_no_blocks() -> None:
    net = nn.Sequential(nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 9))
    assert repeated_blocks(cut(net, "0", "2"), net) == []


def test_a_block_of_another_name_is_left_out() -> None:
    net = ResNet(14, width=4)
    model = cut(net, "layer1.0.conv1", "layer1.1.conv1")
    assert repeated_blocks(model, nn.ModuleDict({"other": net})) == []


def test_the_error_is_the_mean_over_the_blocks_and_nothing_stays_hooked() -> None:
    net, x = ResNet(14, width=4), torch.randn(2, 3, 16, 16)
    model = cut(net, "layer1.0.conv1", "layer2.1.conv1")
    blocks = repeated_blocks(model, net)
    with evaluating(net), evaluating(model), outputs_of(model, blocks) as ours, outputs_of(net, blocks) as theirs:
        net(x), model(x)
    assert ours.keys() == theirs.keys() == {"layer1.0", "layer2.1"}
    parts = [(ours[name] - y).square().sum() / y.square().sum() for name, y in theirs.items()]
    found = block_error(ours, theirs)
    assert found is not None
    torch.testing.assert_close(found, (parts[0] + parts[1]) / 2)
    assert not any(module._forward_hooks for own in (net, model) for module in own.modules())


def test_an_expert_with_other_tokens_is_left_out() -> None:
    ours, theirs = {"a": torch.ones(3, 4), "b": torch.ones(5, 4)}, {"a": 2 * torch.ones(3, 4), "b": torch.ones(2, 4)}
    assert block_error(ours, theirs) == pytest.approx(0.25)
    assert block_error({"b": ours["b"]}, theirs) is None
    assert block_error({"c": ours["a"]}, theirs) is None


def test_a_block_that_returns_a_tuple_is_compared_by_its_first_tensor() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(9, 9)

        def forward(self, x: Tensor) -> tuple[None, Tensor]:
            return None, self.fc(x)

    block = Block()
    with outputs_of(nn.ModuleDict({"0": block}), ["0"]) as seen:
        _, expected = block(torch.randn(2, 9))
    assert seen["0"] is expected
