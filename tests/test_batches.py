"""A model that does not take its inputs is said in one line, with the layer, whoever called it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectrim import api
from spectrim.batches import alone_trainable, forward
from spectrim.cli import run
from spectrim.errors import UserError
from spectrim.statistics.objective import Objective
from spectrim.surgery.cost import model_cost


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4), nn.Linear(5, 4)])

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        if scale is not None:
            x = x * scale
        return self.blocks[1](self.blocks[0](self.stem(x)))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.ones(2, 3), r"failed on inputs of shape \(2, 3\), at layer stem: mat1 and mat2 shapes cannot be mult"),
        (torch.ones(2, 4), r"failed on inputs of shape \(2, 4\), at layer blocks.1: "),
        ((torch.ones(2, 4), torch.ones(2, 3)), r"of shape \(2, 4\), \(2, 3\): The size of tensor a \(4\) must match"),
        ({"x": torch.ones(2, 4), "scael": 1}, r"of shape x \(2, 4\), scael int: .*unexpected keyword argument 'scael'"),
        ([torch.ones(2, 4).long()], "at layer stem: "),
    ],
)
def test_the_failing_layer_and_the_shapes_are_named(inputs: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        forward(Deep(), inputs)
    assert "\n" not in str(refusal.value) and str(refusal.value).endswith("give a model and inputs that fit each other")


def test_wrong_channels_are_refused_wherever_the_model_is_called(net: nn.Sequential) -> None:
    grey = [(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]))]
    judge = Objective(nn.functional.cross_entropy, {"calibration": grey})
    for call in (
        lambda: api.compress(net, calibration=grey),
        lambda: judge.evaluate(net),
        lambda: judge.loss_within(net, "calibration", 1.0, 4),
        lambda: judge.gradients(net, ["0"]),
        lambda: model_cost(net, grey[0][0]),
    ):
        with pytest.raises(UserError, match="at layer 0: .*to have 3 channels, but got 1 channels instead; give"):
            call()
    assert net.training and net[0].weight.grad is None


def test_what_a_model_says_itself_is_kept_and_its_own_faults_are_not_hidden() -> None:
    class Picky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise UserError("this model reads text") if len(x) > 1 else KeyError("fault")

    with pytest.raises(UserError, match="^this model reads text$"):
        forward(Picky(), torch.ones(2))
    with pytest.raises(KeyError):
        forward(Picky(), torch.ones(1))


def test_a_run_on_data_of_other_channels_is_one_line(compose: Any, digits: list[str]) -> None:
    asked = [one for one in digits if not one.startswith("model")]
    with pytest.raises(UserError, match="at layer .*channels, but got 1 channels instead") as refusal:
        run.run(compose(*asked, "model=resnet20", "shape.in_channels=3", "algorithm=truncation"))
    assert "\n" not in str(refusal.value)


def test_only_what_is_named_is_trainable_and_all_is_as_before_afterwards() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].bias.requires_grad_(False)
    before = [parameter.requires_grad for parameter in net.parameters()]
    with pytest.raises(RuntimeError, match="stop"), alone_trainable(net, [net[0].bias, net[1].bias]):
        assert [parameter.requires_grad for parameter in net.parameters()] == [False, True, False, True]
        raise RuntimeError("stop")
    assert [parameter.requires_grad for parameter in net.parameters()] == before
