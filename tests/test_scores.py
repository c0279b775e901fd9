"""Outputs are taken for class scores where the loss reads them so, and for numbers elsewhere."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.errors import UserError
from spectrim.losses import have_scores, loss_of
from spectrim.statistics.row_weights import answers


def triplets(outputs: Tensor, targets: Tensor) -> Tensor:
    """Near where the targets are equal, far where they are not."""
    apart = torch.cdist(outputs, outputs)
    return (apart * torch.where(targets[:, None] == targets, 1.0, -0.1)).mean()


OF_CLASSES = [
    F.cross_entropy,
    nn.CrossEntropyLoss(label_smoothing=0.1),
    lambda outputs, targets: F.cross_entropy(2 * outputs, targets),
    lambda outputs, targets: (1 - outputs.softmax(-1).gather(1, targets[:, None])).square().mean(),
    F.multi_margin_loss,
    F.nll_loss,
]
OF_NUMBERS = [
    triplets,
    lambda outputs, targets: F.poisson_nll_loss(outputs[:, 0], targets.float()),
    lambda outputs, targets: F.mse_loss(outputs, F.one_hot(targets, 4).to(outputs)),
]


@pytest.mark.parametrize("loss", [*OF_CLASSES, *OF_NUMBERS])
def test_outputs_are_class_scores_where_the_loss_reads_them_so(loss: Any) -> None:
    outputs, targets = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    expected = any(loss is own for own in OF_CLASSES)
    assert have_scores(loss, outputs, targets) is expected
    assert (answers(loss, outputs, targets) is not None) is expected


@pytest.mark.parametrize("loss", OF_NUMBERS[:2])
def test_a_loss_of_counts_or_identities_takes_numbers_above_the_width_of_the_outputs(loss: Any) -> None:
    outputs, targets = torch.randn(6, 4), torch.tensor([0, 91, 2, 3, 0, 1])
    torch.testing.assert_close(loss_of(loss, outputs, targets), loss(outputs, targets))
    assert not have_scores(loss, outputs, targets)


def test_a_loss_of_two_views_takes_fewer_targets_than_rows() -> None:
    def two_views(outputs: Tensor, targets: Tensor) -> Tensor:
        return triplets(outputs, targets.repeat(2))

    outputs, targets = torch.randn(6, 4), torch.tensor([0, 1, 2])
    torch.testing.assert_close(loss_of(two_views, outputs, targets), two_views(outputs, targets))
    assert not have_scores(two_views, outputs, targets)


@pytest.mark.parametrize("loss", OF_CLASSES)
def test_a_class_that_the_model_has_not_is_refused_whatever_the_loss(loss: Any) -> None:
    with pytest.raises(UserError, match="target 4 does not fit a model with 4 classes"):
        loss_of(loss, torch.randn(3, 4), torch.tensor([0, 4, 1]))


def test_a_loss_that_writes_to_its_targets_leaves_them_to_the_caller() -> None:
    def from_one(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets.sub_(1))

    outputs, targets = torch.randn(3, 4), torch.tensor([1, 4, 2])
    first = loss_of(from_one, outputs, targets)
    assert targets.tolist() == [1, 4, 2] and torch.equal(loss_of(from_one, outputs, targets), first)


def test_log_probabilities_are_class_scores_whatever_reads_them() -> None:
    outputs, targets = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])

    def loss(given: Tensor, wanted: Tensor) -> Tensor:
        return -given[range(6), wanted].mean()

    assert have_scores(loss, outputs.log_softmax(1), targets)
    assert not have_scores(lambda *given: loss(*given), outputs, targets)
