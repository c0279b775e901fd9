"""All components of the factored layers in one file, from which a model of any size is filled."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from spectrim.checkpoints import single_file
from spectrim.checkpoints.filling import architecture_of, fill, tensors_of
from spectrim.errors import UserError
from spectrim.factored.base import FactoredLayer
from spectrim.factored.dense import DenseLayer
from spectrim.factored.layers import FactoredEmbedding
from spectrim.factored.plan import Kept, RankPlan
from spectrim.surgery.tied import places, tied_layers
from spectrim.surgery.unpacking import pack, unpack_around
from spectrim.tools.safetensors_stream import NAMES, Entry, Shard


def save(
    path: str | Path, whole: nn.Module, plan: RankPlan, dense: nn.Module, sizes: str, beside: Mapping[str, Tensor]
) -> None:
    """Write all components to a safetensors file, atomically.

    A matrix of O rows and I columns takes R (O + I) numbers with R = min(O, I): R² more than the dense one.

    ``whole``: the model with each layer of ``plan`` as plain factors of full rank.
    ``dense``: the model into which the file is loaded.
    ``sizes``: what a reader needs to choose a plan, as text. ``beside``: its tensors.

    Raises ``UserError`` where the model holds other than plain tensors, and as ``single_file.write`` does.
    """
    header = {"plan": plan.to_json(), "architecture": architecture_of(dense), "sizes": sizes}
    tensors = single_file.stored(whole)
    for name, others in tied_layers(whole).items():  # of shared factors, those of the layer in the plan
        for other in others:
            for key in tensors_of(whole.get_submodule(other)).keys() - {"bias"}:
                tensors.pop(f"{other}.{key}", None)
        tensors |= {f"{name}.{key}": value for key, value in tensors_of(whole.get_submodule(name)).items()}
    single_file.write(path, {**tensors, **beside}, {"format": single_file.EVERY_SIZE, **header})


def verified(path: Path) -> Shard:
    """Return a file of every size, read once to compare it with its digest. Raises ``UserError`` for any other file."""
    return single_file.verified(path, (single_file.EVERY_SIZE,))


def filled(into: nn.Module, shard: Shard, plan: RankPlan) -> nn.Module:
    """Factor ``into`` by ``plan``, fill it from a verified file of every size, and return it.

    A layer that is not in ``plan`` gets the product of all of its components. Memory: the layers that the file holds
    in components, beside the model.

    Raises ``UserError`` where the file is of another architecture; ``into`` is then unchanged.
    """
    if architecture_of(into) != shard.metadata["architecture"]:
        raise UserError(
            f"{shard.path} is of another architecture than {type(into).__name__} as built here; "
            "build it as before compression"
        )
    stored = single_file.plan_in(shard)
    pack_again = unpack_around(into, stored.keys())
    try:
        made: dict[str, Tensor] = {}
        for name, own in stored.items():
            made |= _tensors(into, name, own, plan.get(name), shard)
        fill(into, plan, [_AtOneSize.of(shard, made, stored)], shard.path)
    except BaseException:
        pack_again()
        raise
    return pack(into)


def _tensors(into: nn.Module, name: str, stored: Kept, kept: Kept | None, shard: Shard) -> dict[str, Tensor]:
    """Return the tensors of layer ``name`` with the components in ``kept``; those of the dense layer for None.

    Those of layers that share its weight come with it.
    """
    try:
        template = DenseLayer.of(into.get_submodule(name)).without_weights().module
        whole = _on_cpu(stored.form.layer_for(template, stored.rank)).double()
        _read_into(whole, name, shard)
        if kept is None:
            dense = {"weight": whole.weight} if whole.bias is None else {"weight": whole.weight, "bias": whole.bias}
            named = {f"{name}.{key}": value.detach() for key, value in dense.items()}
            return {key: value.to(into.get_parameter(key).dtype) for key, value in named.items()}
        found = places(into, name, _cut(whole, kept, template))
        return {f"{place}.{key}": value for place, own in found.items() for key, value in own.state_dict().items()}
    except (AttributeError, UserError) as error:
        raise UserError(f"{shard.path} is of another architecture, layer {name!r}: {error}") from None


def _cut(whole: FactoredLayer, kept: Kept, template: nn.Module) -> FactoredLayer:
    """Return a layer of the form of ``kept`` with these components of ``whole``."""
    chosen = list(range(kept.keep)) if isinstance(kept.keep, int) else list(kept.keep)
    if max(chosen) >= whole.rank:
        raise UserError(f"the plan keeps component {max(chosen)} of {whole.rank}")
    B_gOR, A_gRI = whole.matrices()
    layer = _on_cpu(kept.form.layer_for(template, kept.rank))
    layer.fill_matrices(B_gOR[:, :, chosen], A_gRI[:, chosen])
    layer.fill_bias(whole.bias)
    if isinstance(layer, FactoredEmbedding) and isinstance(whole, FactoredEmbedding) and layer.whole_rows:
        with torch.no_grad():
            layer.whole.weight.copy_(whole.whole.weight)
            layer.place.copy_(whole.place)
    return layer


def _read_into(layer: FactoredLayer, name: str, shard: Shard) -> None:
    for key, value in tensors_of(layer).items():
        stored = f"{name}.{key}"
        if stored not in shard.entries or shard.entries[stored].shape != tuple(value.shape):
            raise UserError(f"{stored} is not there in the shape {list(value.shape)}")
        with torch.no_grad():
            value.copy_(shard.read(stored))


def _on_cpu(layer: FactoredLayer) -> FactoredLayer:
    return layer.to_empty(device="cpu")


@dataclass(frozen=True)
class _AtOneSize(Shard):
    """A file of every size as ``fill`` reads it: with the tensors of one size in place of all components."""

    made: Mapping[str, Tensor]

    @classmethod
    def of(cls, shard: Shard, made: Mapping[str, Tensor], layers: Collection[str]) -> "_AtOneSize":
        others = {
            name: entry
            for name, entry in shard.entries.items()
            if not any(name.startswith(f"{layer}.") for layer in layers)
        }
        made = {name: value for name, value in made.items() if name not in others}  # such as the bias of a head
        entries = others | {name: Entry.of(NAMES[value.dtype], *value.shape) for name, value in made.items()}
        return cls(shard.path, entries, shard.starts, shard.metadata, made)

    def read(self, name: str) -> Tensor:
        return self.made[name] if name in self.made else super().read(name)
