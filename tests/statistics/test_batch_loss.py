"""The weight of a batch, and the losses that are refused."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from spectrim.errors import UserError
from spectrim.losses import IGNORED, token_loss
from spectrim.statistics.batch_loss import batch_weight, finite_loss, has_gradient


@pytest.mark.parametrize(
    ("loss", "targets", "weight"),
    [
        (F.cross_entropy, torch.zeros(3, dtype=torch.long), 3),
        (F.mse_loss, torch.zeros(3, 4), 3),
        (token_loss, torch.tensor([[1, 2, 3], [4, 5, IGNORED]]), 3),
    ],
)
def test_a_batch_weighs_its_samples_or_its_predicted_tokens(loss: Any, targets: Any, weight: int) -> None:
    assert batch_weight(loss, targets) == weight


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_loss_that_is_not_finite_names_its_split(value: str) -> None:
    with pytest.raises(UserError, match=f"^the loss on the train split is {value}; check[^\n]*$"):
        finite_loss(lambda outputs, targets: outputs.sum() * float(value), torch.ones(2), torch.ones(2), "train")


@pytest.mark.parametrize("targets", [torch.full((2, 4), IGNORED), torch.tensor([[1, IGNORED]]), torch.tensor([[1]])])
def test_a_batch_without_a_token_to_predict_is_named_as_such(targets: torch.Tensor) -> None:
    with pytest.raises(UserError, match="^a batch of the calibration split has nothing to predict: .*leave it out$"):
        finite_loss(token_loss, torch.randn(*targets.shape, 5), targets, "calibration")


@pytest.mark.parametrize("error", [KeyError("box"), AssertionError("two boxes"), ZeroDivisionError()])
def test_a_loss_that_fails_names_its_split_whatever_it_raises(error: Exception) -> None:
    def failing(outputs: Any, targets: Any) -> Any:
        raise error

    with pytest.raises(UserError, match=rf"^the loss failed on the train split: {type(error).__name__}: [^\n]*$"):
        finite_loss(failing, torch.ones(2), torch.ones(2), "train")


def test_a_count_has_no_gradient_and_a_distance_has_one_in_whatever_the_outputs_lie() -> None:
    outputs, targets = {"box": torch.randn(4, 3), "kind": torch.arange(4)}, torch.randn(4, 3)
    assert has_gradient(lambda out, t: F.mse_loss(out["box"], t), outputs, targets)
    assert not has_gradient(lambda out, t: (out["box"] > t).float().mean(), outputs, targets)
    assert not has_gradient(lambda out, t: F.mse_loss(out["box"].detach(), t), outputs, targets)
    assert not outputs["box"].requires_grad
