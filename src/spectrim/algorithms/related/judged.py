"""Judge a compressed model on the calibration split, for algorithms that compare many models."""

from typing import Literal

from torch import nn

from spectrim.errors import UserError
from spectrim.statistics.objective import Objective

JudgedBy = Literal["accuracy", "loss"]


def error_or_loss(model: nn.Module, objective: Objective, judged_by: JudgedBy) -> float:
    """Return the loss or the part of wrongly classified samples, on the calibration split. Lower is better.

    Raises ``UserError`` if accuracy is asked for and the outputs are not class scores.
    """
    found = objective.evaluate(model)
    if judged_by == "loss":
        return found.loss
    if found.accuracy is None:
        raise UserError("judged_by=accuracy needs class scores, which this model does not give: use judged_by=loss")
    return 1 - found.accuracy
