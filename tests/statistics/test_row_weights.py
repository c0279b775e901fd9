"""A loss that ignores targets or weighs them has the Fisher information and the accuracy of what it reads."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.batches import target_count
from spectrim.losses import TokenLoss, fisher_direction
from spectrim.statistics.directions import random_direction
from spectrim.statistics.evaluation import evaluate
from spectrim.statistics.fisher import gate_gradients
from spectrim.statistics.objective import Objective
from spectrim.statistics.row_weights import answers, row_weights
from tests.statistics.test_fisher import Net, factored

CLASSES, ROWS = 5, 12
WEIGHTS = torch.tensor([0.2, 1.0, 3.0, 0.0, 1.0])


def masked(outputs: Tensor, targets: Tensor) -> Tensor:
    """Read the rows of targets from 0 on, as of nodes that somebody labelled."""
    return F.cross_entropy(outputs[targets >= 0], targets[targets >= 0])


def balanced(outputs: Tensor, targets: Tensor) -> Tensor:
    """Weigh each row by hand."""
    weights = WEIGHTS[targets.clamp(min=0)] * (targets >= 0)
    return (F.cross_entropy(outputs, targets.clamp(min=0), reduction="none") * weights).sum() / weights.sum()


LOSSES: list[tuple[Any, int]] = [
    (F.cross_entropy, -100),
    (nn.CrossEntropyLoss(ignore_index=255), 255),
    (nn.CrossEntropyLoss(ignore_index=1), 1),
    (nn.CrossEntropyLoss(weight=WEIGHTS), -100),
    (masked, -1),
    (lambda outputs, targets: F.cross_entropy(outputs, targets, ignore_index=-1), -1),
    (balanced, -7),
]


def batch(ignored: int) -> tuple[Tensor, Tensor]:
    scores, targets = 2 * torch.randn(ROWS, CLASSES), torch.randint(0, CLASSES, (ROWS,))
    targets[::3], targets[1::3], targets[2] = ignored, torch.tensor([0, 2, 4, 2]), 0
    return scores, targets


@pytest.mark.parametrize(("loss", "ignored"), LOSSES)
def test_a_direction_has_the_second_moment_of_the_loss(loss: Any, ignored: int) -> None:
    """That of a row of scores is its block of the loss's Hessian by the scores."""
    scores, targets = batch(ignored)
    hessian = torch.autograd.functional.hessian(lambda own: loss(own, targets), scores)
    traces = torch.stack([hessian[i, :, i].trace() for i in range(ROWS)])  # type: ignore[call-overload]
    p = scores.softmax(1)
    along = random_direction(loss, scores, targets, torch.Generator().manual_seed(3))
    alone = fisher_direction(scores, torch.Generator().manual_seed(3))
    assert along is not None
    scale = (traces / (1 - p.square().sum(1)) * along.predictions).clamp(min=0).sqrt()
    torch.testing.assert_close(along.gradient, alone * scale.unsqueeze(1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("loss", "ignored"), LOSSES)
def test_accuracy_is_that_of_the_targets_that_the_loss_reads(loss: Any, ignored: int) -> None:
    scores, targets = batch(ignored)
    gradient = torch.func.grad(lambda own: loss(own, targets))(scores)
    read = gradient.abs().sum(1) > 0
    assert answers(loss, scores, targets) == (int((scores.argmax(1) == targets)[read].sum()), int(read.sum()))


@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss(), lambda y, t: F.cross_entropy(y, t) + 1])
def test_rows_that_count_alike_have_no_weights(loss: Any) -> None:
    """So nothing is scaled, and rounding changes no number."""
    assert row_weights(loss, torch.randn(ROWS, CLASSES), torch.randint(0, CLASSES, (ROWS,))) is None


@pytest.mark.parametrize("loss", [lambda y, t: (y * 0).sum(), lambda y, t: (y.argmax(1) != t).float().mean()])
def test_a_loss_that_tells_no_weights_has_none(loss: Any) -> None:
    assert row_weights(loss, torch.randn(ROWS, CLASSES), torch.randint(0, CLASSES, (ROWS,))) is None


def of_parts(predicted: list[int], ignored: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of six images each, with targets for only so many."""
    found = []
    for count in predicted:
        targets = torch.randint(0, 3, (6,))
        targets[count:] = ignored
        found.append((torch.randn(6, 4, 5, 5), targets))
    return found


class Positions(nn.Module):
    """Scores three classes at each of four positions of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.conv, self.fc = nn.Identity(), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).tanh())


def of_tokens(lengths: list[int]) -> list[tuple[Tensor, Tensor]]:
    found = []
    for length in lengths:
        targets = torch.randint(0, 3, (6, 4))
        targets[:, length:] = -100
        found.append((torch.randn(6, 4, 8), targets))
    return found


CASES: list[tuple[Any, Callable[[], nn.Module], Callable[[], list[tuple[Tensor, Tensor]]]]] = [
    (F.cross_entropy, Net, lambda: of_parts([6, 2, 5], -100)),
    (nn.CrossEntropyLoss(ignore_index=255), Net, lambda: of_parts([6, 2, 5], 255)),
    (lambda y, t: F.cross_entropy(y, t, ignore_index=-1), Net, lambda: of_parts([6, 2, 5], -1)),
    (TokenLoss(), Positions, lambda: of_tokens([4, 2, 3])),
    (TokenLoss(ahead=0), Positions, lambda: of_tokens([1, 4, 3])),
]


@pytest.mark.parametrize(("loss", "make", "data"), CASES)
def test_the_mean_of_the_rows_is_the_gradient_of_the_mean_loss(loss: Any, make: Any, data: Any) -> None:
    """Also where batches have different numbers of predictions."""
    net, objective = make().eval(), Objective(loss, {"calibration": data()})
    model, spectra = factored(net)
    rows, weights = gate_gradients(model, ["conv", "fc"], objective, 18).rows, objective.gradients(net, ["conv", "fc"])
    for name, spectrum in spectra.items():
        wanted = -spectrum.first_order(weights[name]).diff()
        torch.testing.assert_close(-rows[name].given.mean(0).double(), wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("loss", "make", "data"), CASES)
def test_the_fisher_information_of_a_split_is_that_of_its_batches_by_their_weights(
    loss: Any, make: Any, data: Any
) -> None:
    model, batches = factored(make().eval())[0], data()
    together = gate_gradients(model, ["fc"], Objective(loss, {"calibration": batches}), 18).rows["fc"].fisher
    first = gate_gradients(model, ["fc"], Objective(loss, {"calibration": batches[:1]}), 6).rows["fc"].fisher
    sizes = [evaluate(model, loss, [one], "calibration").n for one in batches]
    share = sizes[0] / sum(sizes)
    torch.testing.assert_close(together[:6].T @ together[:6] / 18, share * first.T @ first / 6, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("loss", "ignored"), [(F.cross_entropy, -100), (nn.CrossEntropyLoss(ignore_index=1), 1)])
def test_the_mean_over_a_split_is_over_the_targets_that_are_read(loss: Any, ignored: int) -> None:
    net, parts = Net().eval(), of_parts([6, 1, 3], ignored)
    found = evaluate(net, loss, parts, "test")
    x, targets = (torch.cat(each) for each in zip(*parts, strict=True))
    read = targets != ignored
    scores = net(x).detach()[read]
    assert found.n == int(read.sum()) < target_count(targets, x)
    assert found.loss == pytest.approx(float(F.cross_entropy(scores, targets[read])), rel=1e-5)
    assert found.accuracy == pytest.approx(float((scores.argmax(1) == targets[read]).float().mean()))
