"""Lipschitz constants in the 2-norm: of activations and pooling, and of a convolution by its singular values."""

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from spectrim.decomposers.matrix import View
from spectrim.errors import UserError

# The largest slope. GELU's is taken at the square root of 2: Phi(x) + x phi(x) there, in closed form. The others that
# are no round number (the tanh form of GELU, SiLU, Mish) have none: the maximum was found numerically, on a grid of
# step 5e-6, and is rounded up in the ninth digit, so that the constant is a bound. The tests find them anew.
_GELU = {"none": 0.5 * (1 + math.erf(1)) + math.exp(-1) / math.sqrt(math.pi), "tanh": 1.128993069}
_CONSTANT: dict[type[nn.Module], float] = {
    nn.Identity: 1.0,
    nn.Flatten: 1.0,
    nn.Dropout: 1.0,  # in eval mode, as everything here
    nn.Dropout2d: 1.0,
    nn.ReLU: 1.0,
    nn.ReLU6: 1.0,
    nn.Tanh: 1.0,
    nn.Softsign: 1.0,
    nn.SELU: 1.0507009873554804934193349852946 * 1.6732632423543772848170429916717,
    nn.SiLU: 1.099839321,
    nn.Mish: 1.088498162,
    nn.Hardswish: 1.5,
    nn.Sigmoid: 0.25,
    nn.Hardsigmoid: 1 / 6,
    nn.LogSigmoid: 1.0,
    nn.Softplus: 1.0,
}


def lipschitz(module: nn.Module) -> float:
    """A rho with ``||a(x) - a(y)|| <= rho ||x - y||`` for whole samples x and y, in eval mode.

    Elementwise activations: the largest slope. Max pooling: the root of how many windows share an input, 1 where they
    do not overlap. Average pooling: that root times the 2-norm of a window's weights. Raises ``UserError`` for a module
    that is not in the table, or not pooled as the formulas suppose.
    """
    kind = type(module)  # a subclass may compute anything
    if kind in _CONSTANT:
        return _CONSTANT[kind]
    if kind in _OF_SETTINGS:
        return _OF_SETTINGS[kind](module)
    raise UserError(f"no Lipschitz constant is known for {kind.__name__}, and the bounds need one")


def overlap(kernel: int, stride: int, dilation: int = 1) -> int:
    """How many windows read one and the same input, at most, along one axis: ``ceil(kernel * gcd / stride)``.

    An input is read at offset i of a window where i * dilation has a given remainder by the stride; of the offsets,
    every (stride / gcd)-th has it, gcd that of stride and dilation. ``kernel`` of them where the stride is 1.
    """
    step = stride // math.gcd(stride, dilation)
    return -(-kernel // step)


def convolution_gain(layer: nn.Conv2d, view: View) -> float:
    """What the singular values of a convolution's matrix ``view`` are multiplied by to bound the norm of the map.

    An extension of S2, whose theorems are about matrix products. Channel view: each output is the matrix times a patch,
    and an input lies in at most ``overlap`` patches an axis, so the map's norm is at most ``sqrt(N_h N_w) sigma_1``.
    Spatial view: the rows first, ``sqrt(N_w) sigma_1``, then kh of them are added: ``sqrt(kh N_w) sigma_1``. At stride
    1 both are ``sqrt(kh kw)``, which holds at every stride. Zero padding (numbers or ``same``) adds nothing to a norm.
    It holds as well for the difference of two such maps, hence for a truncation. Groups are the blocks of one matrix,
    whose singular values are those of all groups. Raises ``UserError`` for padding that repeats inputs.
    """
    if layer.padding_mode != "zeros":
        raise UserError(f"padding_mode={layer.padding_mode} repeats inputs; the bounds know zero padding only")
    down, right = (overlap(*axis) for axis in zip(layer.kernel_size, layer.stride, layer.dilation, strict=True))
    return math.sqrt((down if view == "channel" else layer.kernel_size[0]) * right)


def _gelu(module: nn.GELU) -> float:
    return _GELU[module.approximate]


def _leaky(module: nn.LeakyReLU) -> float:
    return max(1.0, abs(module.negative_slope))


def _elu(module: nn.ELU) -> float:
    return max(1.0, abs(module.alpha))


def _prelu(module: nn.PReLU) -> float:
    return max(1.0, float(module.weight.detach().abs().max()))


def _max_pool(module: nn.MaxPool2d) -> float:
    if module.return_indices:
        raise UserError("max pooling that returns its indices is not a step of a chain")
    return math.sqrt(_windows(module.kernel_size, module.stride, module.dilation))


def _avg_pool(module: nn.AvgPool2d) -> float:
    kh, kw = _pair(module.kernel_size)
    square = 1 / (kh * kw)  # of the 2-norm of a window's weights
    if module.divisor_override:
        square = kh * kw / module.divisor_override**2
    elif module.ceil_mode or (_pair(module.padding) != (0, 0) and not module.count_include_pad):
        square = 1.0  # a window at the border may divide by as little as 1
    return math.sqrt(square * _windows(module.kernel_size, module.stride, 1))


def _windows(kernel: Any, stride: Any, dilation: Any) -> int:
    down, right = (overlap(*axis) for axis in zip(_pair(kernel), _pair(stride), _pair(dilation), strict=True))
    return down * right


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


_OF_SETTINGS: dict[type[nn.Module], Callable[[Any], float]] = {
    nn.GELU: _gelu,
    nn.LeakyReLU: _leaky,
    nn.ELU: _elu,
    nn.PReLU: _prelu,
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _avg_pool,
}
