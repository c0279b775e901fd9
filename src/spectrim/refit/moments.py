"""Second moments of what flows through a layer, for its fit."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from spectrim.statistics.input_moments import Positions, Rows
from spectrim.statistics.processes import Processes
from spectrim.statistics.shifted_moments import is_wide, padded, patch_moment
from spectrim.tools.precision import wide

POSITIONS = 32768  # number of positions of a convolution over all samples; neighbouring positions are nearly alike


class Moments(NamedTuple):
    """Hold second moments ``E[x x^T]``, ``E[y x^T]`` and means of inputs x and wanted outputs y; float64, g groups.

    ``rows``: number of positions that they are the means over, in all samples.
    """

    rows: int
    xx_gII: Tensor
    yx_gOI: Tensor
    x_gI: Tensor
    y_gO: Tensor

    @property
    def means(self) -> tuple[Tensor, ...]:
        return self[1:]

    def centred(self) -> "Moments":
        """Return the second moments of the deviations from the means."""
        x, y = self.x_gI, self.y_gO
        return self._replace(
            xx_gII=self.xx_gII - x.unsqueeze(2) * x.unsqueeze(1), yx_gOI=self.yx_gOI - y.unsqueeze(2) * x.unsqueeze(1)
        )

    def around(self, x_gI: Tensor, y_gO: Tensor) -> "Moments":
        """Return the second moments of the deviations from other points than the means."""
        own, x, y = self.centred(), self.x_gI - x_gI, self.y_gO - y_gO
        return own._replace(
            xx_gII=own.xx_gII + x.unsqueeze(2) * x.unsqueeze(1), yx_gOI=own.yx_gOI + y.unsqueeze(2) * x.unsqueeze(1)
        )

    def without(self, part: "Moments") -> "Moments":
        """Return the moments over the rows that ``part`` leaves of these."""
        rows = self.rows - part.rows
        pairs = zip(self.means, part.means, strict=True)
        return Moments(rows, *((whole * self.rows - own * part.rows) / rows for whole, own in pairs))


@dataclass
class Flows:
    """Hold what one layer sees in each batch.

    ``x``: its input in the compressed model. ``y``: its output in the dense model. ``masks``: 0 at padding (None: no
    padding).
    """

    x: list[Tensor]
    y: list[Tensor]
    masks: list[Tensor | None]


Sums = tuple[int, Sequence[Tensor]]  # number of rows, and sums over them in the order of ``Moments.means``


def moments_of(dense: nn.Module, flows: Flows, processes: Processes) -> Moments:
    """Return the moments over all batches and processes. ``dense``: the layer that made ``flows.y``."""
    return mean_of(*sums_of(dense, flows), processes)


def sums_of(dense: nn.Module, flows: Flows) -> Sums:
    """Return the sums over all batches, in float64."""
    sums: list[Tensor] = []
    count = 0
    for rows, found in _sums_by_batch(dense, flows):
        parts = [part.double() for part in found]
        sums = [total.add_(part) for total, part in zip(sums, parts, strict=True)] if sums else parts
        count += rows
    return count, sums


def mean_of(count: int, sums: Sequence[Tensor], processes: Processes) -> Moments:
    """Return the moments of the sums of all processes."""
    count = int(processes.add_up(torch.tensor(count)))
    return Moments(count, *(processes.add_up(total) / max(count, 1) for total in sums))


def _sums_by_batch(dense: nn.Module, flows: Flows) -> Iterator[Sums]:
    positions = _positions(flows.y) if isinstance(dense, nn.Conv2d) else [None] * len(flows.y)
    if isinstance(dense, nn.Conv2d) and is_wide(dense) and None in positions:
        alike = len({x.shape[1:] for x in flows.x}) == 1
        pairs = [(torch.cat(flows.x), torch.cat(flows.y))] if alike else zip(flows.x, flows.y, strict=True)
        return (_sums_of_wide(dense, *pair) for pair in pairs)
    rows = Rows(dense, "channel" if isinstance(dense, nn.Conv2d) else "linear")
    return (_sums(rows, *one) for one in zip(flows.x, flows.y, flows.masks, positions, strict=True))


def _sums(rows: Rows, x: Tensor, y: Tensor, mask: Tensor | None, at: Positions | None) -> Sums:
    x, y = wide(rows.inputs(x, mask, at)), wide(rows.outputs(y, mask, at))
    return x.shape[1], (x.mT @ x, y.mT @ x, x.sum(1), y.sum(1))


def _sums_of_wide(dense: nn.Conv2d, x: Tensor, y: Tensor) -> Sums:
    """Return the sums over all positions in a part of the time of ``_sums``, for the patches are never made."""
    around, y = wide(padded(dense, x)), wide(y)
    count, xx = patch_moment(dense, around)
    (kh, kw), groups = dense.kernel_size, dense.groups
    yx = conv2d_weight(around, dense.weight.shape, y, groups=groups)  # the gradient is this product
    x_sum = around.sum(0).unfold(1, kh, 1).unfold(2, kw, 1).sum((1, 2))
    yx = yx.reshape(groups, -1, yx[0].numel())
    return count, (xx, yx, x_sum.reshape(groups, -1), y.sum((0, 2, 3)).reshape(groups, -1))


def _positions(outputs: Sequence[Tensor]) -> list[Positions | None]:
    """Return the positions to fit in each batch, ``POSITIONS`` in all and as many a sample; None: every one."""
    part = POSITIONS / sum(y[:, 0].numel() for y in outputs)
    if part >= 1:
        return [None] * len(outputs)
    generator, positions = torch.Generator().manual_seed(0), list[Positions | None]()
    for y in outputs:
        size = y[:, 0].shape
        chosen = torch.randperm(size.numel(), generator=generator)[: math.ceil(part * size.numel())]
        positions.append(torch.unravel_index(chosen.to(y.device), size))
    return positions
