"""Agreement of the predictions of two models on the same inputs. It reads no label."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.batches import device_of, evaluating, forward, to_device
from spectrim.errors import UserError
from spectrim.losses import scores_of
from spectrim.statistics.objective import Objective


class Agreement(NamedTuple):
    """Mean KL divergence from the first model's predictions, in nats, share of equal answers, and number of samples."""

    divergence: float
    same_answer: float
    n: int


def log_probabilities(objective: Objective, model: nn.Module, split: str) -> Tensor:
    """Return the logarithms of the class probabilities of ``model`` in eval mode, shape (N, classes).

    Raises ``UserError`` where its outputs are no class scores.
    """
    device, found = device_of(model), []
    with evaluating(model), torch.no_grad():
        for inputs, targets in objective.counted(split):
            targets = to_device(targets, device)
            scores = scores_of(objective.loss, forward(model, to_device(inputs, device)), targets)
            if scores is None:
                raise UserError("agreement needs class scores; the outputs of this model are none")
            found.append(scores.double().log_softmax(-1))
    return torch.cat(found)


def agreement(first: Tensor, second: Tensor) -> Agreement:
    """Return the agreement of two models, each given by its ``log_probabilities``."""
    divergence = F.kl_div(second, first, reduction="batchmean", log_target=True)
    same = (first.argmax(-1) == second.argmax(-1)).double().mean()
    return Agreement(max(float(divergence), 0.0), float(same), len(first))
