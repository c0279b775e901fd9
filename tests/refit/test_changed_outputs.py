"""What changes the output of a layer on its way, a hook or an activation in place, changes no fit and no moment."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spectrim

CLASSES = 5


class Hooked(nn.Module):
    """A net whose activations are hooks of its layers, or the same net with plain ones."""

    def __init__(self, hooks: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(12, 40), nn.Linear(40, 40), nn.Linear(40, CLASSES)
        self.act, self.bend = (nn.Identity(), nn.Identity()) if hooks else (nn.ReLU(), nn.Tanh())
        if hooks:
            self.first.register_forward_hook(lambda _, __, output: F.relu(output))
            self.second.register_forward_hook(lambda _, __, output: output.tanh_())  # in place

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bend(self.second(self.act(self.first(x)))))


@pytest.mark.parametrize("decomposer", [None, "whitened_channel", spectrim.TwoSidedSVD()])
def test_a_hook_of_a_layer_is_no_part_of_what_its_factors_are_fitted_to(decomposer: Any) -> None:
    torch.manual_seed(1)
    data = [(torch.randn(64, 12), torch.randint(CLASSES, (64,))) for _ in range(3)]
    ours, twin = (
        spectrim.compress(
            Hooked(hooks).eval(), calibration=data, algorithm=spectrim.Joint(params_kept=0.6), decomposer=decomposer
        )
        for hooks in (True, False)
    )
    assert ours.plan == twin.plan and ours.plan
    torch.testing.assert_close(ours.model(data[0][0]), twin.model(data[0][0]), atol=1e-4, rtol=1e-4)


class Activated(nn.Sequential):
    """Convolutions without a bias, each with an activation before its BatchNorm."""

    def __init__(self, inplace: bool) -> None:
        torch.manual_seed(0)
        ends = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, CLASSES)]
        blocks = [
            part
            for channels in (3, 24)
            for part in (nn.Conv2d(channels, 24, 3, bias=False), nn.ReLU(inplace=inplace), nn.BatchNorm2d(24))
        ]
        super().__init__(*blocks, *ends)


def test_an_activation_in_place_before_a_batch_norm_takes_no_offset() -> None:
    torch.manual_seed(1)
    data = [(torch.randn(16, 3, 8, 8), torch.randint(CLASSES, (16,))) for _ in range(3)]
    ours, twin = (
        spectrim.compress(Activated(inplace).eval(), calibration=data, params_kept=0.4) for inplace in (True, False)
    )
    assert ours.plan == twin.plan and {"0", "3"} & dict(ours.plan).keys()
    torch.testing.assert_close(ours.model.state_dict(), twin.model.state_dict())
