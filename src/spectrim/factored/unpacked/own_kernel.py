"""Subclasses of Conv2d that compute their kernel in each pass, such as one with standardised weights."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spectrim.errors import UserError
from spectrim.factored.unpacked.base import Unpacked, with_parameters

SETTINGS: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}  # by default


class UnpackedOwnKernel(Unpacked):
    """A convolution whose kernel is computed of its parameters alone, with a plain one inside, ``conv``.

    NFNet and BiT standardise the weights of each filter, for example. ``conv`` holds the kernel of eval mode. Other
    parameters than weight and bias, such as a gain, stay and have no effect where ``conv`` is factored.
    """

    packs = ("weight", "bias")

    @classmethod
    def layers_of(cls, module: Any) -> dict[str, nn.Module]:
        kernel, settings = kernel_of(module), {name: getattr(module, name) for name in SETTINGS}
        assert kernel is not None
        with torch.device("meta"):
            conv = nn.Conv2d(
                module.in_channels, module.out_channels, module.kernel_size, bias=module.bias is not None, **settings
            )
        return {"conv": with_parameters(conv, kernel, module.bias)}

    @classmethod
    def unpack(cls, module: nn.Module) -> None:
        weight = module.weight
        super().unpack(module)
        own: Any = module
        vars(module)["_given"] = weight, own.conv.weight.detach().clone()

    def packed(self, name: str) -> Tensor | None:
        if name != "weight" or type(self.conv) is not nn.Conv2d:
            return getattr(self.conv, name)
        weight, kernel = vars(self)["_given"]
        if not self.conv.weight.is_meta and not torch.equal(self.conv.weight, kernel):
            raise UserError(
                f"{vars(self)['_packed_class'].__name__} computes its kernel in each pass, so that one that was "
                "trained apart has no place in it; name the layer in exclude="
            )
        return weight

    def pack(self) -> None:
        super().pack()
        del vars(self)["_given"]

    def forward(self, input: Tensor) -> Tensor:
        return self.conv(input)


def kernel_of(module: nn.Module) -> Tensor | None:
    """Return the kernel of a module of a subclass of Conv2d whose forward computes one and convolves its input with it.

    The forward runs in both modes on two small images. Nothing else may happen in it: the same kernel each time, the
    settings of the module, and no buffer that it could change. None where the module is no such one.
    """
    kind: Any = type(module)
    if not isinstance(module, nn.Conv2d) or kind.forward is nn.Conv2d.forward or "forward" in vars(module):
        return None
    if module._buffers or module._modules or not module._parameters.keys() >= {"weight", "bias"}:
        return None
    weight, training = module.weight, module.training
    sizes = [rate * (taps - 1) + 1 for taps, rate in zip(module.kernel_size, module.dilation, strict=True)]
    image = torch.linspace(-1, 1, module.in_channels * sizes[0] * sizes[1], dtype=weight.dtype, device=weight.device)
    image, kernels = image.view(1, -1, *sizes), list[Tensor]()
    try:
        for mode in (True, False):
            vars(module)["training"] = mode
            kernels += [_convolved(module, kind.forward, x) for x in (image, image.flip(1) ** 2)]
    except Exception:  # whatever its forward needs that a small image has not
        return None
    finally:
        vars(module)["training"] = training
    last = kernels[-1]
    same = last.is_meta or all(torch.equal(one, last) for one in kernels)
    return last if same and last.shape == weight.shape and last.dtype == weight.dtype else None


class _Convolutions(TorchFunctionMode):
    """Notes the calls of two-dimensional convolutions: their arguments and output."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[list[Any], Tensor]] = []

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        output = function(*args, **given)
        if function is torch.conv2d:
            names = ("input", "weight", "bias", *SETTINGS)
            given = {"bias": None} | SETTINGS | given | dict(zip(names, args, strict=False))
            self.calls.append(([given[name] for name in names], output))
        return output


def _convolved(module: Any, forward: Callable[..., Any], image: Tensor) -> Tensor:
    """Return the kernel of one pass. Raises ``ValueError`` where the forward is not one convolution of its input."""
    with _Convolutions() as watched:
        output = forward(module, image)
    ((x, kernel, bias, *settings), found) = watched.calls[-1]
    wanted = [getattr(module, name) for name in SETTINGS]
    if len(watched.calls) != 1 or x is not image or bias is not module.bias or output is not found:
        raise ValueError("more than a convolution")
    if [_pair(own) for own in settings] != [_pair(own) for own in wanted]:
        raise ValueError("other settings")
    return kernel


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else (value, value)
