"""The paired change of the loss: its mean is the difference of two evaluations, its error that of repeated draws."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.errors import UserError
from spectrim.losses import IGNORED, token_loss
from spectrim.statistics import paired_loss
from spectrim.statistics.objective import Objective


def _shaken(net: nn.Module, by: float) -> nn.Module:
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return other


def test_the_mean_is_the_difference_of_two_evaluations(net: nn.Module, objective: Objective) -> None:
    other = _shaken(net, 0.05)
    found = paired_loss.change(*(paired_loss.losses(objective, model, "calibration") for model in (net, other)))
    first, second = (objective.evaluate(model).loss for model in (net, other))
    assert found.mean == pytest.approx(second - first, abs=1e-6) and found.error > 0
    assert paired_loss.change(*[paired_loss.losses(objective, net, "calibration")] * 2) == (0.0, 0.0)


def test_of_a_language_model_the_mean_is_over_tokens() -> None:
    torch.manual_seed(1)
    tokens = torch.randint(7, (6, 5))
    targets = torch.where(torch.arange(5) < torch.tensor([[5], [4], [3], [5], [2], [5]]), tokens, IGNORED)
    objective = Objective(token_loss, {"calibration": [(tokens[:4], targets[:4]), (tokens[4:], targets[4:])]})
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    other = _shaken(net, 0.5)
    found = paired_loss.change(*(paired_loss.losses(objective, model, "calibration") for model in (net, other)))
    first, second = (objective.evaluate(model).loss for model in (net, other))
    assert found.mean == pytest.approx(second - first, abs=1e-6)


def test_the_error_is_the_deviation_of_the_mean_over_repeated_draws() -> None:
    torch.manual_seed(2)
    steps, weights = torch.randn(4000, 50, dtype=torch.float64), torch.randint(1, 9, (4000, 50)).double()
    changes = [
        paired_loss.change(paired_loss.Losses(torch.zeros(50), w), paired_loss.Losses(s, w))
        for s, w in zip(steps, weights, strict=True)
    ]
    means, errors = (torch.tensor([one[i] for one in changes]) for i in (0, 1))
    assert float(errors.mean()) == pytest.approx(float(means.std()), rel=0.03)


def test_samples_that_are_hard_for_both_do_not_blur_the_change(net: nn.Module, objective: Objective) -> None:
    one, other = (paired_loss.losses(objective, model, "calibration") for model in (net, _shaken(net, 1e-3)))
    apart = torch.stack([one.values, other.values]).std(1).square().sum().sqrt() / len(one.values) ** 0.5
    assert paired_loss.change(one, other).error < 0.1 * float(apart)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_samples_end_in_one_line(net: nn.Module, batches: Any, count: int) -> None:
    inputs, targets = batches[0]
    pairs: list[tuple[Tensor, Tensor]] = [(inputs[:count], targets[:count])] if count else []
    few = Objective(F.cross_entropy, {"verification": pairs})
    with pytest.raises(UserError, match=f"the verification split has {count} samples; [^\n]*$"):
        paired_loss.losses(few, net, "verification")


def contrast(outputs: Tensor, _: Any) -> Tensor:
    """Compare each sample with all others of its batch: the loss of one alone is 0."""
    return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))


def ordered(outputs: Tensor, _: Any) -> Tensor:
    """Fail on fewer samples than a batch has."""
    return (outputs[6] - outputs[0]).square().mean()


@pytest.mark.parametrize("loss", [contrast, ordered, torch.nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1, 1, 9, 1]))])
def test_a_loss_that_is_no_mean_over_samples_is_compared_batch_by_batch(
    net: nn.Module, batches: Any, loss: Any
) -> None:
    """Else its change would be that of another loss, or none at all."""
    objective, other = Objective(loss, {"calibration": batches}), _shaken(net, 0.05)
    before = paired_loss.losses(objective, net, "calibration")
    assert before.by_batch and len(before.values) == len(batches)
    found = paired_loss.change(before, paired_loss.losses(objective, other, "calibration", before.by_batch))
    first, second = (objective.evaluate(model).loss for model in (net, other))
    assert found.mean == pytest.approx(second - first, abs=1e-6) and found.error > 0 and second != first
    with pytest.raises(UserError, match="split has 1 batches, whose loss is not the mean of those of their samples; a"):
        paired_loss.losses(Objective(loss, {"calibration": batches[:1]}), net, "calibration")


def test_samples_whose_targets_are_ignored_are_left_out(net: nn.Module, batches: Any) -> None:
    """The loss of one alone is not a number."""
    parts = [(x, torch.where(torch.arange(len(y)) % 2 == 0, y, -100)) for x, y in batches]
    found = paired_loss.losses(Objective(F.cross_entropy, {"calibration": parts}), net, "calibration")
    read = [(x[::2], y[::2]) for x, y in batches]
    alone = paired_loss.losses(Objective(F.cross_entropy, {"calibration": read}), net, "calibration")
    assert not found.by_batch and torch.allclose(found.values, alone.values, rtol=1e-4)
