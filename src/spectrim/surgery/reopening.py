"""Open the layers that an earlier compression factored, so that they can be decomposed again."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from spectrim.errors import UserError
from spectrim.factored.base import BlockLinear, FactoredLayer
from spectrim.factored.forms import EmbeddingForm, PivotedForm, PlainForm, TuckerForm
from spectrim.factored.layers import FactoredConv2d, FactoredEmbedding, FactoredLinear, TuckerConv2d
from spectrim.factored.plan import Kept
from spectrim.surgery.given_model import copied
from spectrim.surgery.replacing import in_place_of
from spectrim.surgery.tied import places, tied_layers


def factored_layers(model: nn.Module) -> dict[str, FactoredLayer]:
    """Return the factored layers of ``model`` by name. Of those that share their factors, it is the first embedding."""
    others = {other for own in tied_layers(model).values() for other in own}
    found = {name: module for name, module in model.named_modules() if isinstance(module, FactoredLayer)}
    return {name: layer for name, layer in found.items() if name not in others}


def substituted(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[int, Any]:
    """Return the layers that stand for others in a copy, by the id of the other, as ``given_model.copied`` takes them.

    The copy then shares the parameters of ``model``.

    ``layers``: what replaces layers of ``model``, by name. Layers that share their weight are replaced, too.
    """
    known: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    for name, layer in layers.items():
        for place, own in places(model, name, layer).items():
            before = model.get_submodule(place)
            known[id(before)] = in_place_of(before, own)
    return known


def reopened(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` whose factored layers are dense again, or ``model`` itself if it has none.

    The weight of such a layer is the product of its factors. The copy shares the other parameters with ``model``.
    """
    layers = factored_layers(model)
    if not layers:
        return model
    return copied(model, substituted(model, {name: layer.dense_again() for name, layer in layers.items()}))


def kept_in(layer: FactoredLayer) -> Kept:
    """Return the entry of a plan for ``layer``: its rank and its form."""
    if isinstance(layer, FactoredLinear):
        subspaces = layer.first.blocks if isinstance(layer.first, BlockLinear) else 1
        return Kept(layer.rank, PivotedForm("linear") if layer.pivoted else PlainForm("linear", subspaces))
    if isinstance(layer, FactoredConv2d):
        plain = PlainForm(layer.view, layer.first.groups // layer.second.groups)
        return Kept(layer.rank, PivotedForm(layer.view) if layer.pivoted else plain)
    if isinstance(layer, FactoredEmbedding):
        return Kept(layer.rank, EmbeddingForm(layer.whole_rows, layer.pivoted))
    if isinstance(layer, TuckerConv2d):
        groups = layer.first.groups
        form = TuckerForm(layer.second.out_channels // groups, layer.second.in_channels // groups)
        return Kept(form.outputs + form.inputs - 1, form)  # rank 1 has one direction of either side
    raise UserError(f"a {type(layer).__name__} has no form that a plan can name")
