"""Second moments of the patches of a wide convolution, without the patches.

Two pixels of a patch meet as often as any two with the same shift between them, but for the borders of the image. So a
3x3 kernel needs 13 large matrix products, where its 81 pairs of pixels need 81.

Shape suffixes: G groups, C input channels of a group, H and W sides of the padded images, N samples, I entries of a
patch.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from math import prod

import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.tools.precision import wide

LARGE = 1 << 20  # entries of a weight; smaller ones keep the order of sums that the published numbers have


def is_wide(layer: nn.Module) -> bool:
    """Return whether ``layer`` is a convolution with ``LARGE`` entries that moves its kernel pixel by pixel."""
    if not isinstance(layer, nn.Conv2d) or layer.weight.numel() < LARGE:
        return False
    return max(layer.kernel_size) > 1 and {*layer.stride, *layer.dilation} == {1}


def shifts(kernel: Sequence[int]) -> int:
    """Return the number of shifts between two pixels of a kernel, of which one and its opposite count once."""
    return (prod(2 * side - 1 for side in kernel) + 1) // 2


def padded(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Return images ``x`` with the border that ``layer`` puts around them."""
    around = layer._reversed_padding_repeated_twice  # left, right, top, bottom, also where padding is "same"
    if not any(around):
        return x
    return F.pad(x, list(around), mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)


def patch_moment(layer: nn.Conv2d, around: Tensor) -> tuple[int, Tensor]:
    """Return the number of patches p that the kernel sees, and the sum of ``p p^T`` over them, of shape (G, I, I).

    ``layer``: a convolution whose stride and dilation are 1.
    ``around``: the images, as ``padded`` returns them.
    """
    x_GHWNC = wide(around).unflatten(1, (layer.groups, -1)).permute(1, 3, 4, 0, 2).contiguous()
    (kh, kw), inputs = layer.kernel_size, x_GHWNC.shape[-1]
    blocks = x_GHWNC.new_zeros(kh, kw, kh, kw, layer.groups, inputs, inputs)
    used_HW = x_GHWNC.any(0).flatten(2).any(2)
    for shift in product(range(1 - kh, kh), range(1 - kw, kw)):
        if shift < (0, 0):  # the transpose of its opposite, which is added at the end
            continue
        for (top, left), block in _terms(x_GHWNC, used_HW, (kh, kw), shift):
            blocks[top, left, top + shift[0], left + shift[1]].add_(block, alpha=1.0 if any(shift) else 0.5)
    half = blocks.permute(4, 5, 0, 1, 6, 2, 3).flatten(4).flatten(1, 3)
    count = len(around) * prod(_moves(used_HW.shape, (kh, kw)))
    return count, half + half.mT


def _moves(sides: Sequence[int], kernel: Sequence[int]) -> list[int]:
    """Return the number of places of the kernel along each axis of an image."""
    return [size - side + 1 for size, side in zip(sides, kernel, strict=True)]


def _terms(
    x_GHWNC: Tensor, used_HW: Tensor, kernel: Sequence[int], shift: tuple[int, int]
) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Yield terms of the moment between a pixel of the kernel and the one ``shift`` from it: (row, column), (G, C, C).

    While the kernel moves, each of its pixels passes over a rectangle of the image. The rectangles cut each other into
    pieces, and each piece is multiplied once for all rectangles that hold it.

    ``used_HW``: False where all images are zero, as in a border.
    """
    counts = _moves(used_HW.shape, kernel)
    firsts = [range(max(0, -step), side - max(0, step)) for step, side in zip(shift, kernel, strict=True)]
    for piece in product(*map(_pieces, firsts, counts)):
        moved = [slice(part.start + step, part.stop + step) for part, step in zip(piece, shift, strict=True)]
        held_by = [
            [first for first in own if first <= part.start and part.stop <= first + count]
            for own, part, count in zip(firsts, piece, counts, strict=True)
        ]
        if all(held_by) and used_HW[*piece].any() and used_HW[*moved].any():
            term = x_GHWNC[:, *piece].flatten(1, 3).mT @ x_GHWNC[:, *moved].flatten(1, 3)
            for top, left in product(*held_by):
                yield (top, left), term


def _pieces(firsts: range, count: int) -> list[slice]:
    """Return the pieces of an axis into which the windows ``[first, first + count)`` cut each other."""
    cuts = sorted({*firsts, *(first + count for first in firsts)})
    return [slice(start, stop) for start, stop in pairwise(cuts)]
