"""The distance of two outputs is a KL divergence where they are scores, and a relative squared error elsewhere."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from spectrim.losses import TokenLoss, label_loss
from spectrim.refit.distance import distance, relative_error


def test_the_distance_of_class_scores_is_the_kl_divergence() -> None:
    scores, goal = torch.randn(7, 4, requires_grad=True), torch.randn(7, 4)
    found, measure = distance(F.cross_entropy, scores, goal, torch.zeros(7).long())
    p, q = goal.softmax(1), scores.softmax(1)
    assert measure == "KL divergence (nats)"
    torch.testing.assert_close(found, (p * (p / q).log()).sum(1).mean())
    assert distance(F.cross_entropy, goal, goal, torch.zeros(7).long())[0] == pytest.approx(0, abs=1e-6)


def test_the_distance_of_texts_leaves_padding_out() -> None:
    scores, goal = torch.randn(2, 5, 9), torch.randn(2, 5, 9)
    targets = torch.tensor([[1, 2, 3, 4, 5], [1, 2, -100, -100, -100]])
    found, _ = distance(label_loss, {"logits": scores}, {"logits": goal}, targets)
    rows = targets != -100
    expected = F.kl_div(scores[rows].log_softmax(1), goal[rows].softmax(1), reduction="batchmean")
    torch.testing.assert_close(found, expected)
    assert distance(TokenLoss(), scores, goal, targets)[0] > 0


def test_the_distance_of_other_outputs_is_the_sum_of_relative_squared_errors() -> None:
    boxes, depth = torch.randn(6, 4), 3 * torch.randn(6, 2, 2)
    goal = {"boxes": boxes, "found": torch.ones(6).long(), "depth": (depth,)}
    outputs = {"boxes": boxes * 1.1, "found": torch.ones(6).long(), "depth": (depth * 1.2,)}
    found, measure = distance(F.mse_loss, outputs, goal, None)
    assert measure == "relative squared error"
    assert float(found) == pytest.approx(0.01 + 0.04, rel=1e-4)
    assert float(distance(F.mse_loss, torch.zeros(3, 1), torch.zeros(3, 1), None)[0]) == 0


def test_a_wanted_output_of_zero_gives_a_finite_error() -> None:
    assert float(relative_error(torch.zeros(3), torch.zeros(3))) == 0
    assert torch.isfinite(relative_error(torch.full((3,), 1e-20), torch.zeros(3)))


@pytest.mark.parametrize(
    ("outputs", "goal", "what"),
    [
        (torch.ones(3).long(), torch.ones(3).long(), "without a floating-point tensor"),
        ([torch.ones(1, 4)], [torch.ones(3, 4)], "that differ in shape"),
        ([torch.ones(0, 4)], [torch.ones(3, 4)], "that differ in shape"),
        ([torch.ones(3, 4)] * 2, [torch.ones(3, 4)], "that differ in shape"),
    ],
)
def test_outputs_that_cannot_be_compared_have_no_distance(outputs: Any, goal: Any, what: str) -> None:
    found, measure = distance(F.mse_loss, outputs, goal, None)
    assert found.isnan() and measure == f"relative squared error of outputs {what}"
