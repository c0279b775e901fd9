"""Find the layers that share one weight with an embedding, and replace all of them together."""

from collections.abc import Collection

from torch import Tensor, nn

from spectrim.factored.base import FactoredLayer
from spectrim.factored.layers import FactoredEmbedding
from spectrim.factored.tied import TiedLinear, counterpart


def tied_layers(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the other layers that share the weight of an embedding, by the name of the first embedding with it.

    The layers are embeddings and linear ones, dense or factored, in the order of ``model``. A plan and a spectrum know
    all of them by the name of that first embedding.
    """
    groups: dict[int, list[str]] = {}
    embeddings, inside = set[str](), "\n"
    for name, module in model.named_modules():
        if not name.startswith(inside) and (table := _table(module)) is not None:
            groups.setdefault(id(table), []).append(name)
            embeddings |= {name} if isinstance(module, nn.Embedding | FactoredEmbedding) else set()
        if isinstance(module, FactoredLayer):
            inside = f"{name}."
    found = {}
    for names in groups.values():
        first = next((name for name in names if name in embeddings), None)
        if first is not None and len(names) > 1:
            found[first] = tuple(name for name in names if name != first)
    return found


def _table(module: nn.Module) -> Tensor | None:
    """Return the parameter with a row for each id; None for a module that cannot share one."""
    if isinstance(module, FactoredEmbedding):
        return module.first.weight
    if isinstance(module, TiedLinear):
        return module.second.weight
    return module._parameters.get("weight") if isinstance(module, nn.Embedding | nn.Linear) else None


def places(model: nn.Module, name: str, layer: nn.Module) -> dict[str, nn.Module]:
    """Return ``layer``, which replaces the one at ``name``, and what replaces each layer with the same weight."""
    if not isinstance(model.get_submodule(name), nn.Embedding | FactoredEmbedding):
        return {name: layer}
    others = tied_layers(model).get(name, ())
    return {name: layer, **{other: counterpart(layer, model.get_submodule(other)) for other in others}}


def notes(model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """Return why layers have no rank of their own, as they share the weight of an embedding among ``names``."""
    ties = {name: others for name, others in tied_layers(model).items() if name in names}
    return {
        other: f"its rank is that of {name}, whose weight it shares"
        for name, others in ties.items()
        for other in others
    }


def in_lines(model: nn.Module, names: Collection[str]) -> list[str]:
    """Return ``notes``, a line a layer."""
    return [f"{name}: {why}" for name, why in notes(model, names).items()]
