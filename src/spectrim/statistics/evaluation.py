"""Loss and accuracy of a model, as means over the samples of a split."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from spectrim.batches import device_of, evaluating, forward, to_device
from spectrim.losses import Loss, loss_of
from spectrim.statistics.batch_loss import batch_weight, finite_loss
from spectrim.statistics.processes import ALONE, Processes
from spectrim.statistics.row_weights import answers
from spectrim.statistics.split_reader import Batch, require_samples


class Evaluation(NamedTuple):
    """Mean loss per sample, accuracy in [0, 1] (None if the outputs are not class scores), and number of samples.

    For ``TokenLoss`` the mean is over the predicted tokens and ``n`` is their number, so perplexity is ``exp(loss)``.
    Targets that a loss ignores are no samples.
    """

    loss: float
    accuracy: float | None
    n: int


def evaluate(
    model: nn.Module, loss: Loss, batches: Iterable[Batch], split: str, processes: Processes = ALONE
) -> Evaluation:
    """Measure ``model`` in eval mode, on the batches of all ``processes``.

    Raises ``UserError`` where the loss is not finite or the split is empty.
    """
    device, total, seen, correct, answered = device_of(model), 0.0, 0, 0, 0
    scored = True
    with evaluating(model), torch.no_grad():
        for inputs, targets in batches:
            outputs, targets = forward(model, to_device(inputs, device)), to_device(targets, device)
            count = batch_weight(loss, targets, inputs)
            total += finite_loss(loss, outputs, targets, split).item() * count
            seen += count
            found = answers(loss, outputs, targets)
            scored = scored and found is not None
            correct, answered = (correct + found.right, answered + found.total) if found else (correct, answered)
    sums = torch.tensor([total, seen, correct, answered, not scored], dtype=torch.float64)
    total, seen, correct, answered, unscored = processes.add_up(sums).tolist()
    require_samples(int(seen), split)
    return Evaluation(total / seen, None if unscored or not answered else correct / answered, int(seen))


def loss_within(
    model: nn.Module, loss: Loss, batches: Iterable[Batch], limit: float, n: int, processes: Processes = ALONE
) -> float | None:
    """Return the mean loss of ``model`` in eval mode, or None as soon as it is certain to exceed ``limit``.

    For a loss that is never negative, a partial sum above ``limit * n`` decides. A negative limit needs the whole sum,
    and so do several ``processes``, which must decide alike.

    ``n``: number of samples of the split, as in ``Evaluation``.
    """
    device, total = device_of(model), 0.0
    with evaluating(model), torch.no_grad():
        for inputs, targets in batches:
            targets = to_device(targets, device)
            value = loss_of(loss, forward(model, to_device(inputs, device)), targets)
            total += value.item() * batch_weight(loss, targets, inputs)
            if limit >= 0 and processes.size == 1 and not total <= limit * n:  # a NaN exceeds the limit too
                return None
    total = processes.add_up(torch.tensor(total, dtype=torch.float64)).item()
    return total / n if total <= limit * n else None
