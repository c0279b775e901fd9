"""Run a factored model once, and find the layers at which it fails."""

from collections.abc import Collection

import torch
from torch import nn

from spectrim.batches import Inputs, device_of, evaluating, forward, running, to_device
from spectrim.errors import UserError, first_line
from spectrim.surgery.given_model import unchanged


def failing_layers(model: nn.Module, factored: Collection[str], example: Inputs) -> dict[str, str]:
    """Run ``model`` on ``example``. Return the factored layers at which it fails, with the reason; empty if it runs.

    The layer is the one that was running, or from which an attribute was read that only the dense layer has. Where no
    factored layer was running, all those inside the innermost module that was running are returned.

    ``factored``: the names of the factored layers.
    ``example``: one batch of inputs.
    """
    try:
        with unchanged(model), evaluating(model), torch.no_grad():
            forward(model, to_device(example, device_of(model)))
    except Exception as error:  # whatever a model raises
        cause = error.__cause__ if isinstance(error, UserError) and error.__cause__ else error
        return dict.fromkeys(_running(model, factored, cause), first_line(cause))
    return {}


def _running(model: nn.Module, factored: Collection[str], error: BaseException) -> list[str]:
    """Return the factored layers that were running when ``error`` was raised, or those of the module that was."""
    names = running(model, error)
    for name in names:
        own = [layer for layer in factored if f"{name}.".startswith(f"{layer}.")]
        if own:
            return own
    for name in names:
        inside = [layer for layer in factored if not name or layer.startswith(f"{name}.")]
        if inside:
            return inside
    return list(factored)
