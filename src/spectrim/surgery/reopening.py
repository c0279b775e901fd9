"""Open the layers that an earlier compression factored, so that they can be decomposed again."""

from collections.abc import Mapping

from torch import nn

from spectrim.errors import UserError
from spectrim.factored.base import BlockLinear, FactoredLayer
from spectrim.factored.forms import EmbeddingForm, PivotedForm, PlainForm, TuckerForm
from spectrim.factored.layers import FactoredConv2d, FactoredEmbedding, FactoredLinear, TuckerConv2d
from spectrim.factored.plan import Kept
from spectrim.surgery.replacing import by_id, copied_with, substitutes
from spectrim.surgery.tied import tied_layers


def factored_layers(model: nn.Module) -> dict[str, FactoredLayer]:
    """Return the factored layers of ``model`` by name. Of those that share their factors, it is the first embedding."""
    others = {other for own in tied_layers(model).values() for other in own}
    found = {name: module for name, module in model.named_modules() if isinstance(module, FactoredLayer)}
    return {name: layer for name, layer in found.items() if name not in others}


def require_multipliable(layers: Mapping[str, FactoredLayer]) -> None:
    """Raise ``UserError`` where a factor is of another class than torch's own, such as the integers of torchao."""
    for name, layer in layers.items():
        for factor in layer.factors:
            if type(factor.weight) is not nn.Parameter:
                kind = type(factor.weight).__name__
                raise UserError(f"the factors of layer {name} are of class {kind}; do this before they are quantised")


def reopened(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` whose factored layers are dense again, or ``model`` itself if it has none.

    The weight of such a layer is the product of its factors. The copy shares the other parameters with ``model``.
    Raises ``UserError`` where the factors are quantised.
    """
    layers = factored_layers(model)
    require_multipliable(layers)
    dense = {name: layer.dense_again() for name, layer in layers.items()}
    return copied_with(model, substitutes(model, dense), by_id(model.parameters())) if dense else model


def kept_in(layer: FactoredLayer) -> Kept:
    """Return the entry of a plan for ``layer``: its rank and its form. Raises ``UserError`` where it has no form."""
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
