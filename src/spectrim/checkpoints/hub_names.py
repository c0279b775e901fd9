"""Fill a model of transformers from a compressed checkpoint that has the names of its file on the hub."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from spectrim.checkpoints import filling
from spectrim.errors import UserError
from spectrim.factored.dense import dense_kinds
from spectrim.factored.forms import PivotedForm
from spectrim.factored.plan import RankPlan
from spectrim.fetch import by_configuration
from spectrim.fetch.by_configuration import Place
from spectrim.tools.precision import exact
from spectrim.tools.safetensors_stream import Shard

LOG = logging.getLogger(__name__)
# What becomes of a layer's weight and bias where it is factored.
FACTORS = {
    ".first.weight": ".weight",
    ".second.weight": ".weight",
    ".second.others.weight": ".weight",
    ".second.positions": ".weight",
    ".second.bias": ".bias",
}


def fill(model: nn.Module, plan: RankPlan, shards: Sequence[Shard], where: str | Path) -> None:
    """Factor the layers of ``plan`` and fill ``model``, both found by the rules of transformers.

    A tensor that transformers merges with others becomes dense again, and so does the weight of a layer that cannot be
    factored in the model. Tensors that the model has no use for are left out, with a warning unless its class
    expects them.

    Raises ``UserError`` as ``filling.fill`` does.
    """
    stored = {name: shard for shard in shards for name in shard.entries}
    dense = {name: _name_before(name, plan) for name in stored}
    places = by_configuration.places(model, set(dense.values()))
    modules = _modules(model, plan, places)
    names: dict[str, str] = {}
    computed: dict[str, set[str]] = {}  # tensor of the model → dense tensors that it is computed from
    for name, before in dense.items():
        layer = before.rpartition(".")[0]
        if layer in modules:
            names[name] = modules[layer] + name.removeprefix(layer)
        elif before in places and (layer in plan or places[before].merged):
            computed.setdefault(places[before].name, set()).add(before)
        elif before in places:
            names[name] = places[before].name
    expected = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    unused = [n for n, old in dense.items() if old not in places and not any(re.search(part, old) for part in expected)]
    if unused:
        LOG.warning("%s has no use for %s in %s", type(model).__name__, ", ".join(sorted(unused)), where)
    filled: set[str] = set()
    state = model.state_dict()
    for target, parts in computed.items():
        most = state[target].numel()
        filled |= by_configuration.put(model, {part: _dense(part, plan, stored, most) for part in parts})
    kept = RankPlan.of({module: plan[layer] for layer, module in modules.items()})
    renamed = [shard.renamed(names) for shard in shards]
    filling.fill(model, kept, renamed, where, as_stored=True, filled=filled)


def _modules(model: nn.Module, plan: RankPlan, places: Mapping[str, Place]) -> dict[str, str]:
    """Return the module of each layer of ``plan`` that the model has as a layer and that can be factored."""
    found = {}
    for layer in plan:
        place = places.get(f"{layer}.weight")
        if place and not place.merged:
            module, _, part = place.name.rpartition(".")
            if part == "weight" and isinstance(model.get_submodule(module), dense_kinds()):
                found[layer] = module
    return found


def _name_before(name: str, plan: RankPlan) -> str:
    """Return the name of the dense tensor that a stored tensor is, or is a factor of."""
    for ending, part in FACTORS.items():
        if name.endswith(ending) and name.removesuffix(ending) in plan:
            return name.removesuffix(ending) + part
    return name


def _dense(name: str, plan: RankPlan, stored: Mapping[str, Shard], most: int) -> Tensor:
    """Return a dense tensor as it is stored, or multiplied from its factors.

    Raises ``UserError`` where the product has more than ``most`` numbers, or a factor is missing.
    """
    layer, _, part = name.rpartition(".")

    def read(name: str) -> Tensor:
        if name not in stored:
            raise UserError(f"the checkpoint lacks {name}")
        return stored[name].read(name)

    if name in stored or layer not in plan:  # a router may hold more than a weight and a bias
        return read(name)
    if part == "bias":
        return read(f"{layer}.second.bias")
    pivoted, first = isinstance(plan[layer].form, PivotedForm), read(f"{layer}.first.weight")
    second = read(f"{layer}.second.others.weight" if pivoted else f"{layer}.second.weight")
    if second.shape[-1] != len(first):
        raise UserError(f"the factors of {layer} do not fit one another")
    if (len(second) + len(first) * pivoted) * first.shape[-1] > most:
        raise UserError(f"the factors of {layer} make up a weight that is larger than the model takes")
    with exact():
        rows = second.float() @ first.float()
    if pivoted:
        positions = read(f"{layer}.second.positions")
        if not positions.sort().values.equal(torch.arange(len(first) + len(second), dtype=positions.dtype)):
            raise UserError(f"the positions of the pivots of {layer} are no permutation; write the checkpoint again")
        rows = torch.cat([first.float(), rows])[positions]
    return rows.to(second.dtype)
