"""What is written must compute what the compressed model computes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.batches import Inputs, device_of, evaluating, forward, to_device
from spectrim.errors import UserError, first_line
from spectrim.surgery.comparable import comparable
from spectrim.surgery.stand_ins import UNSTEADY, is_steady

TOLERANCE = 1e-3  # of the largest output; another order of sums in float32 gives 1e-5
HALF_TOLERANCE = 5e-2


def outputs_of(model: nn.Module, example: Inputs) -> list[Tensor]:
    """Return every tensor that ``model`` gives for ``example`` in eval mode, without a gradient."""
    with evaluating(model), torch.no_grad():
        return comparable(forward(model, to_device(example, device_of(model))))


def require_same(
    written: nn.Module | Callable[[Inputs], Any], model: nn.Module, example: Inputs, what: str, advice: str
) -> None:
    """Raise ``UserError`` where ``written`` fails on ``example`` or gives other outputs than ``model``.

    ``written``: a module, or a function of the inputs that returns the outputs in any structure.
    ``what``, ``advice``: what was made of the model and what to do instead, for the message.
    """
    try:
        expected = outputs_of(model, example)
        found = outputs_of(written, example) if isinstance(written, nn.Module) else comparable(written(example))
    except Exception as error:  # A runtime raises errors of its own.
        raise UserError(f"with {what} the model fails: {first_line(error)}; {advice}") from None
    agree = len(found) == len(expected) and all(map(_close, found, expected))
    if not agree and not is_steady(model, example):
        raise UserError(f"{UNSTEADY}, so that {what} cannot be compared with it; let it give the same ones")
    if not agree:
        raise UserError(f"with {what} the model gives other outputs; {advice}")


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    if not expected.is_floating_point():
        return torch.equal(found.to(expected), expected)
    if not expected.numel():
        return True
    tolerance = TOLERANCE if expected.dtype in (torch.float32, torch.float64) else HALF_TOLERANCE
    return bool((found.to(expected) - expected).abs().max() <= tolerance * expected.abs().max())
