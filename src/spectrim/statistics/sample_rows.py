"""Tell which sample of a batch each row inside a model belongs to.

Layers hold the batch where they like: first, second after a transpose, folded together with windows or heads, or
scattered over experts. Nothing is assumed. Every sample n of a batch is given a weight ``w_n`` in the quantity that is
differentiated. A row that belongs to sample n alone then has exactly ``w_n`` times its gradient without weights. A row
that several samples share, such as a learned position, has no such factor.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RANGE = 4.0  # the largest weight over the smallest: wide enough to tell samples apart, narrow enough for 16-bit numbers
TOLERANCE = 1e-2  # of the norm of the gradient; TF32 products round at 1e-3
HALF_TOLERANCE = 5e-2  # where the gradient is held in 16 bits
ENOUGH = 16  # samples by which a layout is confirmed: fewer may agree with it by chance, as the tokens of an expert do


def sample_weights(count: int, draw: int) -> Tensor:
    """Return one weight in [1, ``RANGE``) for each of ``count`` samples, all different, in random order. float32."""
    return RANGE ** (torch.randperm(count, generator=torch.Generator().manual_seed(draw)) / count)


@dataclass(frozen=True)
class Layout:
    """The dimension of a tensor that holds the samples.

    ``axis``: the dimension, counted without that of the channels. ``outer``: a dimension of ``count * k`` rows holds k
    rows of the first sample, then k of the second; otherwise all samples in turn, k times over.
    """

    axis: int
    outer: bool

    def owners(self, positions: torch.Size, count: int) -> Tensor | None:
        """Return the sample of every position, int64 of shape ``positions``; None where ``count`` does not fit."""
        if self.axis >= len(positions) or positions[self.axis] % count:
            return None
        size = positions[self.axis]
        index = torch.arange(size)
        index = index // (size // count) if self.outer else index % count
        return index.reshape([-1 if axis == self.axis else 1 for axis in range(len(positions))]).expand(positions)


BATCH_FIRST = Layout(0, outer=True)
Owners = Layout | Tensor  # a layout, or the sample of every position where the samples are scattered


class RowOwners:
    """The owners of the rows of one call of one layer, learned batch by batch."""

    def __init__(self) -> None:
        self.layout: Layout | None = None
        self.rows_a_sample, self.confirmed = 0.0, 0  # along the axis of the layout; samples that agreed with it

    def trusted(self, positions: torch.Size, count: int) -> Layout | None:
        """Return the layout where it needs no check: one sample alone, or as confirmed on ``ENOUGH`` samples."""
        if count == 1:
            return BATCH_FIRST
        layout = self.layout
        if layout is None or self.confirmed < ENOUGH or layout.axis >= len(positions):
            return None
        return layout if positions[layout.axis] == self.rows_a_sample * count else None

    def settle(self, plain: Tensor, weighted: Tensor, weights: Tensor) -> Layout | None:
        """Return the layout that explains the weighted gradient of a batch; None where no dimension does.

        ``plain``, ``weighted``: the gradient of the same quantity without and with ``weights``, channels last.
        """
        for layout in _candidates(self.layout, plain.ndim - 1):
            owners = layout.owners(plain.shape[:-1], len(weights))
            if owners is not None and _explains(owners, plain, weighted, weights):
                rows = plain.shape[layout.axis] / len(weights)
                if (layout, rows) != (self.layout, self.rows_a_sample):
                    self.layout, self.rows_a_sample, self.confirmed = layout, rows, 0
                self.confirmed += len(weights)
                return layout
        self.confirmed = 0
        return None


def scattered(plain: Tensor, weighted: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor | None:
    """Return the sample of every position, int64, where no layout fits; None where a row has several owners.

    ``weighted``: the gradient with each of two ``weights``. The first tells the owner and the second must confirm it:
    two samples together may imitate a third once.
    """
    owners = _nearest(plain, weighted[0], weights[0])
    pairs = zip(weighted, weights, strict=True)
    return owners if all(_explains(owners, plain, values, own) for values, own in pairs) else None


def _candidates(known: Layout | None, axes: int) -> list[Layout]:
    every = [Layout(axis, outer) for outer in (True, False) for axis in range(axes)]
    return [known, *every] if known else every


def _explains(owners: Tensor, plain: Tensor, weighted: Tensor, weights: Tensor) -> bool:
    """Return whether every row has the weight of its owner, up to rounding."""
    tolerance = TOLERANCE if plain.dtype in (torch.float32, torch.float64) else HALF_TOLERANCE
    expected = plain.float() * weights.to(plain.device)[owners.to(plain.device)].unsqueeze(-1)
    return bool((weighted.float() - expected).norm() <= tolerance * expected.norm())


def _nearest(plain: Tensor, weighted: Tensor, weights: Tensor) -> Tensor:
    """Return for every position the sample whose weight is nearest to the factor between the two gradients."""
    squared = plain.float().square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    factor = (plain.float() * weighted.float()).sum(-1) / squared
    ordered, order = weights.to(plain.device).sort()
    return order[torch.searchsorted((ordered[1:] + ordered[:-1]) / 2, factor)]
