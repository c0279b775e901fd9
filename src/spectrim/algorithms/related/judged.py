"""By what the selectors that search judge a compressed model."""

from typing import Literal

from torch import nn

from spectrim.errors import UserError
from spectrim.statistics.objective import Objective

JudgedBy = Literal["accuracy", "loss"]


def badness(model: nn.Module, objective: Objective, judged_by: JudgedBy) -> float:
    """On the calibration split: the loss, or the part of the samples that is classified wrongly. Lower is better.

    Raises ``UserError`` where the outputs are no class scores and accuracy is asked for.
    """
    found = objective.evaluate(model)
    if judged_by == "loss":
        return found.loss
    if found.accuracy is None:
        raise UserError("the outputs of this model are no class scores, so there is no accuracy: give judged_by=loss")
    return 1 - found.accuracy
