"""A random direction in blocks of rows starts the backward pass that one of all scores together starts."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spectrim.losses import IGNORED, Loss, TokenLoss, fisher_direction, scores_of, span_loss
from spectrim.statistics import directions
from spectrim.statistics.directions import random_direction

WORDS = 50


def of_tokens() -> tuple[Loss, Any, Any]:
    targets = torch.randint(0, WORDS, (4, 9))
    targets[1, 5:] = IGNORED
    return TokenLoss(), {"logits": torch.randn(4, 9, WORDS, requires_grad=True)}, targets


def of_spans() -> tuple[Loss, Any, Any]:
    logits = {f"{end}_logits": torch.randn(4, 9, requires_grad=True) for end in ("start", "end")}
    return span_loss, logits, torch.randint(0, 9, (4, 2))


def of_classes() -> tuple[Loss, Any, Any]:
    return F.cross_entropy, torch.randn(4, 9, requires_grad=True), torch.randint(0, 9, (4,))


@pytest.mark.parametrize("case", [of_tokens, of_spans, of_classes])
@pytest.mark.parametrize("top", [None, 3])
@pytest.mark.parametrize("block", [1, 7 * WORDS, 10**6])
def test_it_is_the_gradient_of_the_sum_of_scores_along_the_direction(
    case: Any, top: int | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directions, "BLOCK", block)
    loss, outputs, targets = case()
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    along = random_direction(loss, outputs, targets, generators[0], top)
    scores = scores_of(loss, outputs, targets)
    assert along is not None and scores is not None and along.predictions == len(scores)
    if top is not None:
        scores = scores.topk(top).values
    whole = (scores * fisher_direction(scores, generators[1])).sum()
    leaves: list[Tensor] = list(outputs.values()) if isinstance(outputs, dict) else [outputs]
    wanted = torch.autograd.grad(whole, leaves)
    found = torch.autograd.grad(along.values, leaves, along.gradient)
    assert all(one.equal(other) for one, other in zip(found, wanted, strict=True))
    assert generators[0].get_state().equal(generators[1].get_state())


def test_outputs_without_scores_have_none() -> None:
    x = torch.randn(4, 3)
    assert random_direction(F.mse_loss, x, x, torch.Generator()) is None
