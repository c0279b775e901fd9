"""Convolutions of one and three dimensions, transposed convolutions and bilinear maps, each with a plain layer inside.

The layer is a two-dimensional convolution, or a linear one, on the same numbers in another order.
"""

from itertools import product
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from spectrim.factored.unpacked.base import Unpacked, linear, with_parameters


def _on_images(module: Any, weight: Tensor) -> nn.Conv2d:
    """Return a convolution of images with this weight (outputs, inputs of a group, rows, columns).

    Stride, padding and dilation are those of ``module``, which has one or three dimensions, along the last two.
    """

    def last_two(values: tuple[int, ...], of_a_row: int) -> tuple[int, int]:
        along_rows, along_columns = (of_a_row, *values)[-2:]
        return along_rows, along_columns

    with torch.device("meta"):
        conv = nn.Conv2d(
            weight.shape[1] * module.groups,
            module.out_channels,
            (weight.shape[2], weight.shape[3]),
            last_two(module.stride, 1),
            module.padding if isinstance(module.padding, str) else last_two(module.padding, 0),
            last_two(module.dilation, 1),
            module.groups,
            module.bias is not None,
            module.padding_mode,
        )
    return with_parameters(conv, weight, module.bias)


class UnpackedConv1d(Unpacked, nn.Conv1d):
    """A convolution of one dimension, as one of images with a single row. Its layer is ``conv``."""

    kinds = (nn.Conv1d,)
    packs = ("weight", "bias")

    @classmethod
    def layers_of(cls, module: Any) -> dict[str, nn.Module]:
        return {"conv": _on_images(module, module.weight.unsqueeze(2))}

    def packed(self, name: str) -> Tensor | None:
        value = getattr(self.conv, name)
        return value.squeeze(2) if name == "weight" else value

    def forward(self, input: Tensor) -> Tensor:
        return self.conv(input.unsqueeze(-2)).squeeze(-2)


class UnpackedConv3d(Unpacked, nn.Conv3d):
    """A convolution of volumes, as one of images: each slice, with the slices that the kernel sees as channels.

    Its layer is ``conv``. It takes a copy of the input for each slice of the kernel.
    """

    kinds = (nn.Conv3d,)
    packs = ("weight", "bias")

    @classmethod
    def layers_of(cls, module: Any) -> dict[str, nn.Module]:
        return {"conv": _on_images(module, module.weight.flatten(1, 2))}

    def packed(self, name: str) -> Tensor | None:
        value = getattr(self.conv, name)
        return value.unflatten(1, (-1, self.kernel_size[0])) if name == "weight" else value

    def forward(self, input: Tensor) -> Tensor:
        x = input if input.dim() == 5 else input.unsqueeze(0)
        ends = self._reversed_padding_repeated_twice[-2:]
        if any(ends):
            x = F.pad(x, [0, 0, 0, 0, *ends], mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
        seen = (self.kernel_size[0] - 1) * self.dilation[0] + 1
        x = x.unfold(2, seen, self.stride[0])[..., :: self.dilation[0]]  # (N, C, slices, H, W, kernel)
        slices = x.permute(0, 2, 1, 5, 3, 4).flatten(2, 3)
        y = self.conv(slices.flatten(0, 1)).unflatten(0, slices.shape[:2]).transpose(1, 2)
        return y if input.dim() == 5 else y.squeeze(0)


class UnpackedTransposed(Unpacked, _ConvTransposeNd):
    """A transposed convolution, as a 1x1 convolution into one channel a tap of the kernel, and a sum over the taps.

    Its layer is ``conv``, without the bias, which is added after the sum.
    """

    packs = ("weight",)

    @classmethod
    def layers_of(cls, module: Any) -> dict[str, nn.Module]:
        taps = module.out_channels * prod(module.kernel_size)
        with torch.device("meta"):
            conv = nn.Conv2d(module.in_channels, taps, 1, groups=module.groups, bias=False)
        by_group = module.weight.flatten(1).unflatten(0, (module.groups, -1)).transpose(1, 2)
        return {"conv": with_parameters(conv, by_group.flatten(0, 1)[..., None, None], None)}

    def packed(self, name: str) -> Tensor | None:
        own: Any = self
        by_group = own.conv.weight.flatten(1).unflatten(0, (own.groups, -1)).transpose(1, 2)
        return by_group.flatten(0, 1).unflatten(1, (-1, *own.kernel_size)).contiguous()

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return the transposed convolution; ``output_size`` as in the classes of torch."""
        own: Any = self
        kernel, stride, dilation, padding = own.kernel_size, own.stride, own.dilation, own.padding
        dims = len(kernel)
        extra = own._output_padding(input, output_size, stride, padding, kernel, dims, dilation)
        x = input if input.dim() == dims + 2 else input.unsqueeze(0)
        sizes = x.shape[2:]
        taps = own.conv(x.flatten(2).unsqueeze(2)).squeeze(2).unflatten(1, (-1, *kernel)).unflatten(-1, sizes)
        reach = [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(sizes, stride, dilation, kernel, strict=True)]
        whole = taps.new_zeros(*taps.shape[:2], *(size + e for size, e in zip(reach, extra, strict=True)))
        for tap in product(*(range(k) for k in kernel)):
            starts = [place * d for place, d in zip(tap, dilation, strict=True)]
            at = [slice(a, a + (n - 1) * s + 1, s) for a, n, s in zip(starts, sizes, stride, strict=True)]
            whole[:, :, *at] += taps[:, :, *tap]
        y = whole[:, :, *(slice(p, size - p) for p, size in zip(padding, whole.shape[2:], strict=True))]
        if own.bias is not None:
            y = y + own.bias.reshape(-1, *[1] * dims)
        return y if input.dim() == dims + 2 else y.squeeze(0)


class UnpackedTransposed1d(UnpackedTransposed, nn.ConvTranspose1d):
    """A transposed convolution of one dimension."""

    kinds = (nn.ConvTranspose1d,)


class UnpackedTransposed2d(UnpackedTransposed, nn.ConvTranspose2d):
    """A transposed convolution of images."""

    kinds = (nn.ConvTranspose2d,)


class UnpackedTransposed3d(UnpackedTransposed, nn.ConvTranspose3d):
    """A transposed convolution of volumes."""

    kinds = (nn.ConvTranspose3d,)


class UnpackedBilinear(Unpacked, nn.Bilinear):
    """A bilinear map ``x1^T W_o x2 + b_o``, as the layer ``linear`` on x2 and an inner product with x1."""

    kinds = (nn.Bilinear,)
    packs = ("weight",)

    @classmethod
    def layers_of(cls, module: Any) -> dict[str, nn.Module]:
        return {"linear": linear(module.weight.flatten(0, 1))}

    def packed(self, name: str) -> Tensor | None:
        return self.linear.weight.unflatten(0, (-1, self.in1_features))

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        y = (self.linear(input2).unflatten(-1, (-1, self.in1_features)) @ input1.unsqueeze(-1)).squeeze(-1)
        return y if self.bias is None else y + self.bias
