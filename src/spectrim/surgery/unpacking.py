"""Unpack the modules of a model whose matrices are no layers, and pack those again in which nothing is factored."""

from collections import Counter
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import nn

from spectrim.factored.base import FactoredLayer
from spectrim.factored.unpacked import kinds
from spectrim.factored.unpacked.base import Unpacked
from spectrim.surgery.given_model import copied
from spectrim.surgery.lora import ADAPTED, adapted_parameters, refuse_merges

SHARED = "its weight is shared with another layer"


def unpacked(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` in which every matrix is a layer where it can be, or ``model`` if all are already.

    The copy computes the same up to rounding. It shares the parameters that stay with ``model``, and memory with the
    others. So attention, LSTM, GRU, one- and three-dimensional and transposed convolutions and the experts of a mixture
    can be factored like all layers.
    """
    names = [name for name, module in model.named_modules() if kinds.class_for(module)]
    reasons = refusals(model)
    if not (wanted := [name for name in names if name not in reasons]):
        return model
    own = copied(model, {id(parameter): parameter for parameter in model.parameters()})
    for name in wanted:
        _unpack(own.get_submodule(name))
    return own


def refusals(model: nn.Module) -> dict[str, str]:
    """Return why modules of kinds that can be unpacked stay as they are, by name."""
    (places, owners), found, adapted = uses(model), {}, adapted_parameters(model)
    for name, module in model.named_modules():
        if own := kinds.class_for(module):
            shared = places[module] > 1 or any(owners[id(p)] > 1 for p in module.parameters(recurse=False))
            if name in adapted:
                found[name] = ADAPTED
            elif reason := SHARED if shared and own.packed_names(module) else kinds.refusal(module):
                found[name] = reason
    return found


def uses(model: nn.Module) -> tuple[Counter[nn.Module], Counter[int]]:
    """Return in how many places each module lies, and how many modules hold each parameter themselves, by its id."""
    places = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    return places, Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))


def unpack_around(model: nn.Module, layers: Collection[str]) -> Callable[[], None]:
    """Unpack in place the modules that hold a layer of ``layers``. Return a function that undoes it.

    This is how a plan tells which modules are unpacked: those in which it names a layer.
    """
    undo = []
    for name, module in model.named_modules():
        around = any(layer.startswith(f"{name}." if name else "") for layer in layers)
        if around and kinds.class_for(module) and not kinds.refusal(module):
            undo.append(partial(_restore, module, _state(module)))
            _unpack(module)
    return lambda: [one() for one in undo].clear()


def pack(model: nn.Module) -> nn.Module:
    """Pack again, in place, every module of ``model`` that holds no factored layer. Return ``model``."""
    for module in model.modules():
        if isinstance(module, Unpacked) and not any(isinstance(one, FactoredLayer) for one in module.modules()):
            module.pack()
    refuse_merges(model)
    return model


def _unpack(module: nn.Module) -> None:
    own = kinds.class_for(module)
    assert own is not None
    with torch.enable_grad():  # a part of a parameter tells whether it requires a gradient
        own.unpack(module)


def _state(module: nn.Module) -> tuple[type, dict[str, Any]]:
    own = vars(module)
    return type(module), own | {name: dict(own[name]) for name in ("_parameters", "_modules")}


def _restore(module: nn.Module, state: tuple[type, dict[str, Any]]) -> None:
    module.__class__, attributes = state
    vars(module).clear()
    vars(module).update(attributes)
