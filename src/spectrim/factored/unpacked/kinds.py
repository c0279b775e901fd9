"""Which modules can be unpacked, and by which class."""

import torch
from torch import nn

from spectrim.factored.unpacked.attention import UnpackedAttention, UnpackedEncoder, UnpackedEncoderLayer
from spectrim.factored.unpacked.base import Unpacked
from spectrim.factored.unpacked.convolutions import (
    UnpackedBilinear,
    UnpackedConv1d,
    UnpackedConv3d,
    UnpackedTransposed1d,
    UnpackedTransposed2d,
    UnpackedTransposed3d,
)
from spectrim.factored.unpacked.experts import UnpackedExperts
from spectrim.factored.unpacked.own_kernel import UnpackedOwnKernel, kernel_of
from spectrim.factored.unpacked.own_linear import UnpackedOwnLinear, computes_the_product
from spectrim.factored.unpacked.recurrent import (
    UnpackedGRU,
    UnpackedGRUCell,
    UnpackedLSTM,
    UnpackedLSTMCell,
    UnpackedRNN,
    UnpackedRNNCell,
)

CLASSES: tuple[type[Unpacked], ...] = (
    UnpackedAttention,
    UnpackedEncoderLayer,
    UnpackedEncoder,
    UnpackedLSTM,
    UnpackedGRU,
    UnpackedRNN,
    UnpackedLSTMCell,
    UnpackedGRUCell,
    UnpackedRNNCell,
    UnpackedConv1d,
    UnpackedConv3d,
    UnpackedTransposed1d,
    UnpackedTransposed2d,
    UnpackedTransposed3d,
    UnpackedBilinear,
)
BY_KIND = {kind: own for own in CLASSES for kind in own.kinds}


def class_for(module: nn.Module) -> type[Unpacked] | None:
    """Return the class that can unpack modules of the class of ``module``; None where there is none.

    A subclass of a module of torch may compute something else. So it has none, but a Linear or a Conv2d that was tried
    has one.
    """
    if isinstance(module, Unpacked | torch.jit.ScriptModule):
        return None
    weights = [module._parameters.get(name) for name in UnpackedExperts.packs]
    if all(weight is not None and weight.ndim == 3 for weight in weights):
        return UnpackedExperts
    if kernel_of(module) is not None:
        return UnpackedOwnKernel
    return UnpackedOwnLinear if computes_the_product(module) else BY_KIND.get(type(module))


def refusal(module: nn.Module) -> str | None:
    """Return why ``module`` cannot be unpacked, though its class can; None where nothing speaks against it."""
    own = class_for(module)
    if own is None:
        return None
    if own_method := next((name for name in vars(module) if callable(getattr(type(module), name, None))), None):
        return f"{type(module).__name__} has a {own_method} of its own"
    if not set(own.packed_names(module)) <= module._parameters.keys():
        return "its weight is computed from other parameters"
    parameters = list(module.parameters(recurse=False))
    if others := [p.dtype for p in parameters if not p.is_floating_point()]:
        return f"its weight is of {others[0]}"
    if any(type(p) is not nn.Parameter for p in parameters):
        return "its weight is no plain parameter"
    return own.refusal(module)
