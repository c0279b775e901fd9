"""A loss that adds up over a batch is refused; any mean passes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spectrim
from spectrim.errors import UserError
from spectrim.statistics.mean_loss import require_mean

SCORES, CLASSES, NUMBERS = torch.randn(8, 5), torch.randint(0, 5, (8,)), torch.randn(8, 5)
MEANS: list[tuple[Any, Any, Any]] = [
    (F.cross_entropy, SCORES, CLASSES),
    (nn.CrossEntropyLoss(weight=torch.rand(5) + 1), SCORES, CLASSES),
    (nn.MSELoss(), SCORES, NUMBERS),
    (nn.KLDivLoss(reduction="batchmean"), SCORES, NUMBERS.softmax(1)),
    (lambda y, t: (y - t).square().sum() / len(y), SCORES, NUMBERS),
    (lambda y, t: F.cross_entropy(y["logits"], t), {"logits": SCORES}, CLASSES),
    (lambda y, _: F.cross_entropy(y @ y.T, torch.arange(len(y))), SCORES, None),  # compares samples
    (lambda y, _: (y[6] - y[0]).square().mean(), SCORES, None),  # fails on one sample
    (lambda y, t: F.l1_loss(y[0], t[0]) + F.mse_loss(y[1], t[1]), (SCORES, NUMBERS), (NUMBERS, SCORES)),
    (lambda y, t: torch.stack([own["x"].sum() for own in y]).mean(), [{"x": row} for row in SCORES], None),
]
SUMS: list[tuple[Any, Any, Any]] = [
    (nn.CrossEntropyLoss(reduction="sum"), SCORES, CLASSES),
    (nn.NLLLoss(reduction="sum"), SCORES, CLASSES),
    (nn.CrossEntropyLoss(reduction="sum"), {"logits": SCORES}, CLASSES),
    (nn.MSELoss(reduction="sum"), SCORES, NUMBERS),
    (lambda y, t: F.cross_entropy(y["logits"], t, reduction="sum"), {"logits": SCORES}, CLASSES),
    (lambda y, t: F.mse_loss(y[0], t[0], reduction="sum"), (SCORES, NUMBERS), (NUMBERS, SCORES)),
    (lambda y, t: torch.stack([own["x"].square().sum() for own in y]).sum(), [{"x": row} for row in SCORES], CLASSES),
    (lambda y, _: y.square().sum(), SCORES, None),
]


@pytest.mark.parametrize(("loss", "outputs", "targets"), MEANS)
def test_a_mean_passes_and_draws_no_random_number(loss: Any, outputs: Any, targets: Any) -> None:
    before = torch.get_rng_state()
    require_mean(loss, outputs, targets)
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize(("loss", "outputs", "targets"), SUMS)
def test_a_sum_is_refused(loss: Any, outputs: Any, targets: Any) -> None:
    with pytest.raises(UserError, match="^the loss adds up over a batch.*; give its mean"):
        require_mean(loss, outputs, targets)


@pytest.mark.parametrize("algorithm", [spectrim.Joint(params_kept=0.6), spectrim.Lossless(), spectrim.RankSelection()])
def test_no_selection_takes_a_sum(algorithm: Any) -> None:
    model, data = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)), [(torch.randn(8, 6), CLASSES)]
    with pytest.raises(UserError, match="the loss adds up"):
        spectrim.compress(
            model, algorithm=algorithm, calibration=data, verification=data, loss=nn.CrossEntropyLoss(reduction="sum")
        )


def test_a_loss_that_is_no_sum_is_checked_once() -> None:
    calls = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(len(outputs))
        return F.mse_loss(outputs, targets)

    for _ in range(3):
        require_mean(loss, SCORES, NUMBERS)
    assert calls == [1, 2]
