"""Check that a loss is a mean over its batch, as weights of batches and Fisher information take it to be."""

import math
import weakref
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from spectrim.batches import are_samples, cloned, one_sample, target_count, tensors_of, with_tensors
from spectrim.errors import UserError
from spectrim.losses import Loss, SpanLoss, TokenLoss, ignored_class, taken_by

_CHECKED: "weakref.WeakSet[Any]" = weakref.WeakSet()


def require_mean(loss: Loss, outputs: Any, targets: Any) -> None:
    """Raise ``UserError`` where ``loss`` is a sum over samples: one sample, repeated, then has twice the loss.

    The first batch that tells decides. A loss that fails on one sample, or compares samples, is not checked.
    """
    with suppress(TypeError):  # it allows no weak reference or has no hash
        if loss in _CHECKED:
            return
    alone, twice = _of_one_sample(loss, outputs, targets)
    if math.isfinite(alone) and alone and math.isclose(twice, 2 * alone, rel_tol=1e-4):
        raise UserError(
            "the loss adds up over a batch, as one sample given twice has twice the loss; give its mean: "
            "reduction='mean', or the sum over the number of samples in the batch"
        )
    if alone:
        with suppress(TypeError):
            _CHECKED.add(loss)


def _of_one_sample(loss: Loss, outputs: Any, targets: Any) -> tuple[float, float]:
    """Return the loss of the first sample and that of two such samples; NaN where it fails, or is known to be a mean.

    Outputs whose number of samples is not certain are not read.
    """
    means = isinstance(loss, TokenLoss | SpanLoss) or ignored_class(loss) is not None
    if (means and getattr(loss, "reduction", "mean") == "mean") or (
        targets is None and not isinstance(outputs, Tensor)
    ):
        return math.nan, math.nan
    count = target_count(outputs if targets is None else targets, None)
    if not _hold(outputs, count) or not (targets is None or _hold(targets, count)):
        return math.nan, math.nan
    alone = [one_sample(part, 0, count) for part in (outputs, targets)]
    pairs = alone, [_twice(part) for part in alone]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            found = [float(loss(taken_by(loss, own), wanted)) for own, wanted in map(cloned, pairs)]
    except Exception:  # whatever the loss raises on one sample
        return math.nan, math.nan
    return found[0], found[1]


def _hold(values: Any, count: int) -> bool:
    """Return whether ``values`` hold ``count`` samples, and nothing that belongs to all of them."""
    if isinstance(values, list | tuple) and are_samples(values, count):
        return True
    tensors = tensors_of(values)
    return bool(tensors) and all(own.ndim and len(own) == count for own in tensors)


def _twice(values: Any) -> Any:
    """Return a batch that holds the sample of ``values``, a batch of one, twice."""
    if isinstance(values, list) and are_samples(values, 1):
        return values * 2
    return with_tensors(values, lambda own: torch.cat([own, own]))
