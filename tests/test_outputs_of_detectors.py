"""Outputs in a list, with a dictionary for each sample, are measured sample by sample, or refused with the ways out."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spectrim
from spectrim.algorithms.refitted import Refitted
from spectrim.errors import UserError


class Detecting(nn.Module):
    """Gives a list with a dictionary for each image, as detectors do; two numbers of each are no scores of classes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 5))

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        return [{"box": own[:4], "score": own[4].sigmoid()} for own in self.net(x)]


def detection_loss(outputs: list[dict[str, Tensor]], targets: list[dict[str, Tensor]]) -> Tensor:
    pairs = zip(outputs, targets, strict=True)
    return torch.stack([F.mse_loss(own["box"], wanted["box"]) - own["score"].log() for own, wanted in pairs]).mean()


def test_outputs_in_a_list_with_an_item_a_sample_give_the_plan_of_batches_of_one() -> None:
    torch.manual_seed(0)
    data = [(torch.randn(8, 12), [{"box": torch.randn(4)} for _ in range(8)]) for _ in range(2)]
    alone = [(own[None], [wanted]) for x, targets in data for own, wanted in zip(x, targets, strict=True)]
    algorithm = spectrim.Joint(params_kept=0.6, refit=0)
    model = Detecting().eval()
    plans = [
        spectrim.compress(model, calibration=split, algorithm=algorithm, loss=detection_loss).plan
        for split in (data, alone)
    ]
    assert plans[0] and plans[0] == plans[1]


def test_outputs_that_cross_entropy_does_not_take_are_told_with_the_ways_out() -> None:
    data = [(torch.randn(8, 12), [{"box": torch.randn(4)} for _ in range(8)])]
    with pytest.raises(UserError, match="the outputs are a list, which cross-entropy does not take; give loss="):
        spectrim.compress(Detecting(), calibration=data, params_kept=0.6)
    unmeasured = Refitted(spectrim.Truncation(params_kept=0.6))
    assert spectrim.compress(Detecting(), calibration=data, algorithm=unmeasured).plan
