"""The loss of a split is the mean over its samples, however they are batched."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.batches import evaluating
from spectrim.errors import UserError
from spectrim.losses import IGNORED, token_loss
from spectrim.statistics.evaluation import evaluate, loss_within


def test_loss_and_accuracy_are_means_over_samples(net: nn.Sequential, batches: Any) -> None:
    x, y = (torch.cat(part) for part in zip(*batches, strict=True))
    with evaluating(net), torch.no_grad():
        logits = net(x)
    measured = evaluate(net, F.cross_entropy, batches, "calibration")
    assert measured.loss == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
    assert measured.accuracy == pytest.approx((logits.argmax(1) == y).float().mean().item())
    assert measured.n == 39


@pytest.mark.parametrize("reduced", [lambda logits, targets: logits.sum(1), lambda logits, targets: 3.0])
def test_a_loss_that_is_not_a_scalar_tensor_is_refused(net: nn.Sequential, batches: Any, reduced: Any) -> None:
    with pytest.raises(UserError, match="must return a scalar tensor"):
        evaluate(net, reduced, batches, "calibration")


@pytest.mark.parametrize("offset", [0.0, -5.0])
def test_the_loss_within_a_limit_is_the_loss_or_none(net: nn.Sequential, batches: Any, offset: float) -> None:
    seen = []

    def counted(logits: Tensor, targets: Tensor) -> Tensor:
        seen.append(len(targets))
        return F.cross_entropy(logits, targets) + offset

    loss = evaluate(net, counted, batches, "calibration").loss
    assert loss_within(net, counted, batches, loss + 1e-9, 39) == pytest.approx(loss)
    assert loss_within(net, counted, batches, loss + 1, 39) == pytest.approx(loss)
    assert loss_within(net, counted, batches, loss - 1e-6, 39) is None
    seen.clear()
    assert loss_within(net, counted, batches, 0.1 + offset, 39) is None
    assert seen == ([16] if not offset else [16, 16, 7])  # certain after one batch, where losses cannot be negative


def test_a_loss_that_fails_without_a_word_goes_by_the_name_of_its_error(net: nn.Sequential, batches: Any) -> None:
    def silent(logits: Tensor, targets: Tensor) -> Tensor:
        raise ValueError

    with pytest.raises(UserError, match="the loss failed on these outputs and targets: ValueError$"):
        evaluate(net, silent, batches, "calibration")


def test_the_sums_are_those_of_a_plain_loop_to_the_last_bit(net: nn.Sequential, batches: Any) -> None:
    """Records hold these numbers: another order of operations would change them."""
    total, right = 0.0, 0
    net.eval()
    for x, y in batches:
        with torch.inference_mode():
            logits = net(x)
            total += F.cross_entropy(logits, y).item() * len(y)
            right += int((logits.argmax(1) == y).sum())
    measured = evaluate(net, F.cross_entropy, batches, "calibration")
    assert measured == (total / 39, right / 39, 39)
    assert loss_within(net, F.cross_entropy, batches, measured.loss + 1, 39) == measured.loss


def test_of_a_language_model_a_batch_weighs_as_many_tokens_as_it_predicts() -> None:
    torch.manual_seed(3)
    tokens, net = torch.randint(7, (6, 5)), nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)).eval()
    targets = torch.where(torch.arange(5) < torch.tensor([[5], [4], [3], [5], [2], [5]]), tokens, IGNORED)
    total, counts = 0.0, (13, 5)  # 4 + 3 + 2 + 4 and 1 + 4: the first token of a sequence is never predicted
    for rows, count in zip((slice(0, 4), slice(4, 6)), counts, strict=True):
        with torch.inference_mode():
            logits = net(tokens[rows])[:, :-1].flatten(0, 1)
            total += F.cross_entropy(logits, targets[rows, 1:].flatten(), ignore_index=IGNORED).item() * count
    pairs = [(tokens[:4], targets[:4]), (tokens[4:], targets[4:])]
    assert evaluate(net, token_loss, pairs, "calibration") == (total / 18, None, 18)
