"""The second factor of pivoted factors: it passes the pivots on and computes the other outputs from them."""

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from spectrim.errors import UserError
from spectrim.factored.pivoting import pivoted

MANY = 512  # rows of inputs; a product with fewer is not faster for padding
LINE = 16  # numbers of float32 in 64 bytes; products in other precisions are not faster


class Completion(nn.Module):
    """Matrices ``[1; C]`` with permuted rows, one a group, and a bias. It maps the pivots to all outputs.

    ``others``: holds the coefficients C of the rows that are no pivots, shape (groups * (rows - rank), rank).
    ``positions``: for each row its place among the pivots and the others, int32 of shape (groups * rows). It is a
        buffer, no parameter.
    """

    __jit_unused_properties__ = ("weight",)

    def __init__(self, plain: nn.Linear | nn.Conv2d, others: nn.Linear | nn.Conv2d, rank: int, groups: int) -> None:
        super().__init__()
        self.rank, self.groups, self.rows = rank, groups, rank + len(others.weight) // groups
        self.others = others
        self.bias = None if plain.bias is None else nn.Parameter(torch.empty_like(plain.bias))
        self.positions: Tensor
        self.register_buffer("positions", torch.empty(groups * self.rows, dtype=torch.int32))

    @staticmethod
    def of(plain: nn.Linear | nn.Conv2d, rank: int) -> "Completion":
        """Return an uninitialised completion that takes the place of the second factor ``plain``."""
        if isinstance(plain, nn.Linear):
            return LinearCompletion(plain, rank)
        return KernelCompletion(plain, rank)

    @property
    def weight(self) -> Tensor:
        """The coefficients."""
        return self.others.weight

    def start(self) -> None:
        """Set valid positions, so that the layer runs before it is filled."""
        self.positions.copy_(torch.arange(len(self.positions)))

    def matrices(self, coefficients: Tensor) -> Tensor:
        """Return ``[1; C]`` with its rows in their order, shape (groups, rows, rank). Differentiable."""
        C = coefficients.reshape(self.groups, -1, self.rank)
        one = torch.eye(self.rank, dtype=C.dtype, device=C.device).expand(self.groups, -1, -1)
        return torch.cat([one, C], 1).flatten(0, 1).index_select(0, self.positions).unflatten(0, (self.groups, -1))

    @abstractmethod
    def plain_weight(self, coefficients: Tensor) -> Tensor:
        """Return the weight of the plain second factor that computes the same. Differentiable."""

    @torch.no_grad()
    def plain_module(self) -> nn.Module:
        """Return the plain second factor with the same map, a linear layer or a convolution of torch."""
        weight = self.plain_weight(self.weight)
        plain = self._plain_empty(weight)
        plain.weight = nn.Parameter(weight, self.weight.requires_grad)
        plain.bias = None if self.bias is None else nn.Parameter(self.bias.clone(), self.bias.requires_grad)
        return plain

    @abstractmethod
    def _plain_empty(self, weight: Tensor) -> nn.Linear | nn.Conv2d:
        """Return a layer of the plain second factor's settings, with weights on the meta device."""

    @torch.no_grad()
    def fill(self, B_gOR: Tensor, A_gRI: Tensor) -> Tensor:
        """Take the pivots of ``B @ A``. Return their rows, which the first factor computes, shape (groups, rank, I)."""
        found = [pivoted(B, A) for B, A in zip(B_gOR, A_gRI, strict=True)]
        self.weight.copy_(torch.cat([own.coefficients_MR for own in found]).reshape(self.weight.shape))
        self.positions.copy_(torch.cat([own.positions + n * self.rows for n, own in enumerate(found)]))
        return torch.stack([own.pivot_rows_RI for own in found])

    def require_positions(self, positions: Tensor) -> None:
        """Raise ``UserError`` unless ``positions``, from a file, hold each place of each group once."""
        for group, own in enumerate(positions.to("cpu", torch.int64).split(self.rows)):
            require_permutation(own - group * self.rows)

    @abstractmethod
    def forward(self, input: Tensor) -> Tensor:
        """Return all outputs from the pivots."""


class LinearCompletion(Completion):
    """The completion of a linear layer: it multiplies by C alone, then puts all outputs in their order."""

    def __init__(self, plain: nn.Linear, rank: int) -> None:
        super().__init__(plain, nn.Linear(rank, plain.out_features - rank, bias=False), rank, 1)

    def plain_weight(self, coefficients: Tensor) -> Tensor:
        return self.matrices(coefficients).squeeze(0)

    def _plain_empty(self, weight: Tensor) -> nn.Linear:
        return nn.Linear(self.rank, len(weight), device="meta")

    def forward(self, input: Tensor) -> Tensor:
        others = self.others(input) if torch.jit.is_scripting() else self._multiplied(input)
        outputs = torch.cat([input, others], -1).index_select(-1, self.positions)
        # Under autocast the outputs have 16 bits and the bias has 32: a plain sum would have 32, too.
        return outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)

    def _multiplied(self, input: Tensor) -> Tensor:
        """Return the outputs that are no pivots. Columns may follow to which no position leads.

        Rows of zeros below C make some products faster. It is a matter of layout: MKL takes up to half longer to write
        rows that do not begin at a multiple of 64 bytes.
        """
        others = self.others
        # A compiler needs the same graph for every batch.
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or input.numel() < MANY * self.rank:
            return others(input)
        weight, hooked = others.weight, others._forward_hooks or others._forward_pre_hooks
        plain = type(others) is nn.Linear and type(weight) in (Tensor, nn.Parameter)  # as long as no library changes it
        faster = input.device.type == "cpu" and input.dtype == weight.dtype == torch.float32
        watched = _get_current_dispatch_mode() is not None  # a counter of MACs would count the padding
        if hooked or watched or not plain or not faster or len(weight) % LINE == 0:
            return others(input)
        return F.linear(input, F.pad(weight, (0, 0, 0, -len(weight) % LINE)))


class KernelCompletion(Completion):
    """The completion of a convolution. A row is an output, or in the spatial view an output and a row of the kernel.

    In the spatial view the identity falls on taps of the kernel. In the channel view, putting the channels together
    takes longer than multiplying by the identity. So each pass puts the kernel together and runs the convolution of
    plain factors: less is stored, and no multiplication is saved.
    """

    def __init__(self, plain: nn.Conv2d, rank: int) -> None:
        groups, rows = plain.groups, plain.out_channels * plain.kernel_size[0] // plain.groups
        others = nn.Conv2d(groups * rank, groups * (rows - rank), 1, groups=groups, bias=False)
        super().__init__(plain, others, rank, groups)
        self.kernel_size, self.stride, self.dilation = plain.kernel_size, plain.stride, plain.dilation
        self.padding, self.padding_mode = plain.padding, plain.padding_mode
        self._border = list(plain._reversed_padding_repeated_twice)

    def plain_weight(self, coefficients: Tensor) -> Tensor:
        return factor_weight(self.matrices(coefficients), self.kernel_size[0])

    def _plain_empty(self, weight: Tensor) -> nn.Conv2d:
        names = "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"
        settings: dict[str, Any] = {name: getattr(self, name) for name in names}
        return nn.Conv2d(self.groups * self.rank, len(weight), **settings, device="meta")

    def forward(self, input: Tensor) -> Tensor:
        kernel = self.plain_weight(self.others.weight)
        if self.padding_mode == "zeros":
            return F.conv2d(input, kernel, self.bias, self.stride, self.padding, self.dilation, self.groups)
        padded = F.pad(input, self._border, mode=self.padding_mode)
        return F.conv2d(padded, kernel, self.bias, self.stride, 0, self.dilation, self.groups)


class Transposed(nn.Module):
    """``x -> x W``: the transposed map of a linear layer with the weight W, whose parameter it holds."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.weight = of.get_parameter("weight")

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight


class TransposedCompletion(Transposed):
    """The transposed map of a ``LinearCompletion``, whose coefficients it holds.

    ``order``: the inputs that are pivots, then the others, int32. It is the inverse of ``positions``.
    """

    def __init__(self, of: LinearCompletion) -> None:
        super().__init__(of.others)
        self.order: Tensor
        self.register_buffer("order", of.positions.argsort().to(torch.int32))

    def forward(self, input: Tensor) -> Tensor:
        pivots, others = input.index_select(-1, self.order).tensor_split([self.weight.shape[1]], -1)
        return pivots + others @ self.weight


def factor_weight(B_gOR: Tensor, kernel_rows: int) -> Tensor:
    """Return matrices (g, O, R) in the shape of the weight of a second factor: (g * O / kh, R, kh, 1).

    A row of a matrix is a pair of an output and a row of the kernel. The strides are those of a new tensor: with others
    in a dimension of size 1, torch computes a grouped convolution of ``channels_last`` images wrongly.
    """
    weight = B_gOR.unflatten(1, (-1, kernel_rows)).transpose(2, 3).flatten(0, 1).unsqueeze(-1)
    return weight.clone(memory_format=torch.contiguous_format)


def factor_matrices(weight: Tensor, groups: int) -> Tensor:
    """Return the weight of a second factor as matrices (g, O, R): the inverse of ``factor_weight``."""
    if weight.ndim == 2:
        return weight.unsqueeze(0)
    return weight.squeeze(-1).unflatten(0, (groups, -1)).transpose(2, 3).flatten(1, 2)


def require_permutation(places: Tensor) -> None:
    """Raise ``UserError`` unless ``places`` hold each number from 0 once."""
    if not torch.equal(places.to("cpu", torch.int64).sort().values, torch.arange(len(places))):
        raise UserError("it is no permutation")
