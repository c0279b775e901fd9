"""Agreement of the predictions of two models, without labels."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spectrim.errors import UserError
from spectrim.statistics.agreement import agreement, log_probabilities
from spectrim.statistics.objective import Objective


def test_divergence_and_equal_answers_of_two_known_models() -> None:
    first = torch.tensor([[0.5, 0.5], [0.9, 0.1]], dtype=torch.float64).log()
    second = torch.tensor([[0.25, 0.75], [0.9, 0.1]], dtype=torch.float64).log()
    found = agreement(first, second)
    assert found.divergence == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2)
    assert (found.same_answer, found.n) == (0.5, 2)  # of the first two equal scores argmax takes class 0


def test_a_model_agrees_with_itself_whatever_the_labels(net: nn.Sequential, batches: list) -> None:
    wrong = [(inputs, (targets + 1) % 5) for inputs, targets in batches]
    one, other = (
        log_probabilities(Objective(F.cross_entropy, {"test": split}), net, "test") for split in (batches, wrong)
    )
    assert one.shape == (39, 5) and torch.allclose(one.exp().sum(1), torch.ones(39, dtype=torch.float64))
    assert agreement(one, other) == (0.0, 1.0, 39)


def test_outputs_that_are_no_scores_are_refused() -> None:
    split = [(torch.randn(4, 3), torch.randn(4, 2))]
    with pytest.raises(UserError, match="agreement needs class scores"):
        log_probabilities(Objective(F.mse_loss, {"test": split}), nn.Linear(3, 2), "test")
