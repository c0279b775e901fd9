"""Replace the layers of a model by factored ones, as a plan says."""

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from spectrim.decomposers.spectrum import Spectrum
from spectrim.errors import UserError
from spectrim.factored.base import FactoredLayer
from spectrim.factored.dense import DenseLayer, dense_kinds
from spectrim.factored.plan import Keep, RankPlan
from spectrim.factored.tied import TiedLinear
from spectrim.surgery.given_model import HOOKS, copying, deep_copy
from spectrim.surgery.tied import places


def replace(model: nn.Module, name: str, layer: nn.Module) -> Callable[[], None]:
    """Let the layer at the dotted ``name`` of ``model`` become ``layer``, ``in_place_of`` what it was before.

    The module stays the same object: the model may also hold it in a list, a bound method or a closure. Layers that
    share the weight of an embedding are replaced with it (``tied.places``).

    Returns a function that undoes it.
    """
    undo = []
    for place, own in places(model, name, layer).items():
        module = model.get_submodule(place)
        undo.append(partial(_become, module, type(module), dict(vars(module))))
        own = in_place_of(module, own)
        _become(module, type(own), dict(vars(own)))

    def undone() -> None:
        for one in undo:
            one()

    return undone


def _become(module: nn.Module, kind: type[nn.Module], attributes: Mapping[str, Any]) -> None:
    module.__class__ = kind
    vars(module).clear()
    vars(module).update(attributes)


def in_place_of(before: nn.Module, layer: nn.Module) -> nn.Module:
    """Return ``layer``, with the mode, the memory format, the hooks and, if factored, the attributes of ``before``.

    A layer whose weight or bias is frozen has frozen factors or a frozen bias.
    """
    layer.train(before.training)
    vars(layer).update({name: vars(before)[name] for name in HOOKS})
    if isinstance(before, nn.Conv2d) and not before.weight.is_contiguous():
        layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if isinstance(layer, FactoredLayer):
        layer.adopt(before)
        old = before if isinstance(before, FactoredLayer) else DenseLayer.of(before)
        weight = before.first.weight if isinstance(before, FactoredLayer) else old.weight
        bias = old.bias is not None and old.bias.requires_grad  # asked first: a head may hold the bias of ``before``
        layer.requires_grad_(weight.requires_grad)
        if layer.bias is not None and old.bias is not None:
            layer.bias.requires_grad_(bias)
    return layer


def plan_of(spectra: Mapping[str, Spectrum], keep: Mapping[str, Keep]) -> RankPlan:
    """Return the plan that keeps ``keep`` of each layer: a rank, or the indices of components."""
    return RankPlan.of({name: spectra[name].kept(which) for name, which in keep.items()})


def apply(model: nn.Module, plan: RankPlan, spectra: Mapping[str, Spectrum], *, shared: bool = False) -> nn.Module:
    """Return a copy of ``model`` with the layers of ``plan`` factored.

    A replaced layer is not copied first, so memory holds the model and the copy, which may be half its size.

    ``shared``: the copy shares the other parameters with ``model``, for a copy that is only measured.

    Raises ``UserError`` for a layer that is not in ``spectra``, and for factors that its precision cannot hold.
    """
    layers: dict[str, nn.Module] = {}
    for name, kept in plan.items():
        if name not in spectra:
            raise UserError(f"the plan names {name!r}, which is not a layer of this model that can be factored")
        try:
            layers[name] = spectra[name].factor(kept.keep)
        except UserError as error:
            raise UserError(f"layer {name}: {error}") from None
    return copied_with(model, substitutes(model, layers), by_id(model.parameters()) if shared else {})


Substitutes = list[tuple[nn.Module, nn.Module]]  # modules of a model, each with the one that takes its place in a copy


def substitutes(model: nn.Module, layers: Mapping[str, nn.Module]) -> Substitutes:
    """Return what ``layers``, by name, replace in a copy of ``model``. Layers that share their weight go with them."""
    found = []
    for name, layer in layers.items():
        for place, own in places(model, name, layer).items():
            before = model.get_submodule(place)
            found.append((before, in_place_of(before, own)))
    return found


def by_id(objects: Iterable[Any]) -> dict[int, Any]:
    """Return ``objects`` by their ids, as ``copy.deepcopy`` takes what the copy shares with the original."""
    return {id(own): own for own in objects}


def copied_with(model: nn.Module, others: Substitutes, known: Mapping[int, Any]) -> nn.Module:
    """Return a copy of ``model`` with ``others`` in place of some modules, which are not copied first.

    The hooks of such a module, and the attributes that a factored layer keeps of a dense one, are copied with the
    model. Where they lead to another module, they lead to the one of the copy.

    ``known``: what else stands for a part of ``model`` in the copy, by the id of the part.

    Raises ``UserError`` where a part of the model allows no copy.
    """
    memo = {**known, **{id(before): own for before, own in others}}
    with copying(model):
        result = deep_copy(model, memo)
        for before, own in others:
            if isinstance(own, TiedLinear):  # its bias is still that of ``model``
                own._parameters["bias"] = copy.deepcopy(own._parameters["bias"], memo)
            if isinstance(own, FactoredLayer):
                own.adopt(before, memo)
            elif isinstance(before, FactoredLayer) and isinstance(own, dense_kinds()):
                vars(own).update(copy.deepcopy(vars(before)["_adopted"], memo))
            vars(own).update({name: copy.deepcopy(vars(before)[name], memo) for name in HOOKS})
    return result
