"""Give Lipschitz constants in the 2-norm, of activations, pooling and convolutions."""

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from spectrim.decomposers.matrix import View
from spectrim.errors import UserError

# The largest slope. That of GELU is Phi(x) + x phi(x) at x = sqrt(2). Those of the tanh form of GELU, of SiLU and of
# Mish have no closed form: the maximum on a grid of step 5e-6, rounded up in the ninth digit, is a bound. The tests
# compute them again.
_GELU = {"none": 0.5 * (1 + math.erf(1)) + math.exp(-1) / math.sqrt(math.pi), "tanh": 1.128993069}
_CONSTANT: dict[type[nn.Module], float] = {
    nn.Identity: 1.0,
    nn.Flatten: 1.0,
    nn.Dropout: 1.0,  # in eval mode, like all of these
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
    """Return a rho with ``||a(x) - a(y)|| <= rho ||x - y||`` for whole samples x and y, in eval mode.

    For an elementwise activation it is the largest slope. For max pooling it is the root of the number of windows that
    share an input, which is 1 without overlap. For average pooling it is that root times the 2-norm of the weights of a
    window.

    Raises ``UserError`` for a module without a known constant.
    """
    kind = type(module)  # not isinstance, because a subclass may compute anything
    if kind in _CONSTANT:
        return _CONSTANT[kind]
    if kind in _OF_SETTINGS:
        return _OF_SETTINGS[kind](module)
    raise UserError(f"no Lipschitz constant is known for {kind.__name__}, and the bounds need one")


def overlap(kernel: int, stride: int, dilation: int) -> int:
    """Return the largest number of windows that read the same input along one axis, ``ceil(kernel * gcd / stride)``.

    A window reads the input at offset i if i * dilation has a given remainder modulo the stride. This holds for every
    (stride / gcd)-th offset, where gcd is that of stride and dilation. At stride 1 it holds for all ``kernel`` offsets.
    """
    step = stride // math.gcd(stride, dilation)
    return -(-kernel // step)


def convolution_gain(layer: nn.Conv2d, view: View) -> float:
    """Return the factor by which the singular values of ``view`` bound the norm of a convolution.

    This extends S2, whose theorems are about matrix products. Let N_h and N_w be the ``overlap`` along each axis.

    Channel view: each output is the matrix times a patch, and an input lies in at most N_h N_w patches. The norm is at
    most ``sqrt(N_h N_w) sigma_1``. Spatial view: the norm of the row convolution is at most ``sqrt(N_w) sigma_1``, and
    kh of its rows are added: ``sqrt(kh N_w) sigma_1``. At stride 1 both are ``sqrt(kh kw) sigma_1``, which is a bound
    at every stride.

    The bound also holds for the difference of two such maps, hence for a truncation. Zero padding does not add to a
    norm. Groups are the blocks of one matrix, whose singular values are those of all groups.

    Raises ``UserError`` for padding that repeats inputs.
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
    square = 1 / (kh * kw)  # squared 2-norm of the weights of a window
    if module.divisor_override:
        square = kh * kw / module.divisor_override**2
    elif module.ceil_mode or (_pair(module.padding) != (0, 0) and not module.count_include_pad):
        square = 1.0  # A window at the border may divide by 1.
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
