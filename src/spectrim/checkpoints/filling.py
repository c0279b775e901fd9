"""Fill a dense model from a compressed checkpoint: factor its layers, compare all names and shapes, then copy."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from spectrim.errors import UserError
from spectrim.factored.completion import Completion, TransposedCompletion, require_permutation
from spectrim.factored.layers import FactoredEmbedding
from spectrim.factored.plan import RankPlan
from spectrim.factored.tied import TiedLinear
from spectrim.surgery.lora import refuse_merges
from spectrim.surgery.replacing import replace
from spectrim.surgery.unpacking import unpack_around
from spectrim.tools.content import of_extra_state, state_of
from spectrim.tools.safetensors_stream import Shard


def fill(
    model: nn.Module,
    plan: RankPlan,
    shards: Sequence[Shard],
    where: str | Path,
    *,
    architecture: str | None = None,
    extra_state: str | None = None,
    as_stored: bool = False,
    filled: Collection[str] = (),
) -> nn.Module:
    """Factor the layers of ``model`` by ``plan``, fill it with the tensors of ``shards``, and return it.

    One tensor at a time is held in addition to the model. A tensor of ``model`` on the meta device is placed on the
    CPU; any other stays on its device.

    ``where``: the checkpoint, for messages.
    ``architecture``: the digest that ``architecture_of`` must give for the factored model; None: any.
    ``extra_state``: the digest that ``of_extra_state`` must give for the factored model; None: any.
    ``as_stored``: whether the numbers keep the precision of the checkpoint. By default they get that of ``model``.
    ``filled``: names of tensors that ``model`` holds already, so that the checkpoint need not.

    Raises ``UserError`` where the checkpoint is of another architecture; ``model`` is then unchanged.
    """
    with factored(model, plan, where):
        if architecture is not None and architecture_of(model) != architecture:
            raise UserError(
                f"{where} is of another architecture than {type(model).__name__} as built here; "
                "build it as before compression"
            )
        if extra_state is not None and of_extra_state(model) != extra_state:
            raise UserError(
                f"{where} does not hold the extra state of its model, and this {type(model).__name__} has another "
                "one; build it with the same, or call set_extra_state before"
            )
        _require_same_tensors(model, shards, where, filled)
        for shard in shards:
            require_positions(model, shard.entries, shard.read, where)
        _require_no_buffer_left_on_meta(model)
    state, aliases = tensors_of(model), names_of_shared(model)
    with torch.no_grad():
        for shard in tqdm(shards, "load", unit="shard", leave=False, disable=None):
            for name in shard.entries:
                owner, _, attribute = name.rpartition(".")
                if attribute == "_extra_state":
                    model.get_submodule(owner).set_extra_state(shard.read(name))
                else:
                    _put(model, aliases[name], state[name], shard.read(name), as_stored)
    refuse_merges(model)
    return model


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of the model's state, without the extra state that a module may add."""
    return {name: value for name, value in state_of(model).items() if isinstance(value, Tensor)}


def require_stored(model: nn.Module) -> None:
    """Raise ``UserError`` where a part of the state of ``model`` is no plain tensor: sparse, or integers of torchao.

    The extra state that a module may add is left out of a file unless it is a tensor.
    """
    for name, value in state_of(model).items():
        if type(value) not in (Tensor, nn.Parameter, nn.Buffer) and not name.endswith("_extra_state"):
            kind = type(value.data).__name__ if type(value) is nn.Parameter else type(value).__name__
            raise UserError(f"{name} is of class {kind}, which no file holds; save the model before it is quantised")
        if isinstance(value, Tensor) and value.layout is not torch.strided:
            raise UserError(
                f"{name} has the layout {value.layout}, which no file holds; give register_buffer persistent=False, so "
                "that the model makes it when it is built, or keep it dense"
            )


def _place(value: Tensor) -> object:
    """Return what two tensors agree in that are the same part of memory."""
    if value.layout is not torch.strided:  # it has no memory of its own
        return id(value)
    # An address would not do, as all tensors on the meta device have the address 0.
    return value.untyped_storage()._cdata, value.storage_offset(), value.shape, value.stride()


def names_of_shared(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return for each name in the model's state all names of the same tensor, the first one first.

    Tied parameters have several names.
    """
    groups: dict[object, list[str]] = {}
    for name, value in tensors_of(model).items():
        groups.setdefault(_place(value) if value.numel() else name, []).append(name)
    return {name: tuple(names) for names in groups.values() for name in names}


def architecture_of(model: nn.Module) -> str:
    """Return a digest of the names and shapes of the model's state, and of which tensors are shared."""
    state, aliases = tensors_of(model), names_of_shared(model)
    first = {name: aliases[name][0] for name in state}
    shapes = {name: list(value.shape) if first[name] == name else first[name] for name, value in state.items()}
    return hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def factored(model: nn.Module, plan: RankPlan, where: str | Path) -> Iterator[None]:
    """Replace the layers of ``plan`` by factored ones; put the dense ones back where the block raises."""
    pack_again = unpack_around(model, plan.keys())
    undo: list[Callable[[], None]] = []
    new: dict[str, nn.Module] = {}
    try:
        for name, kept in plan.items():
            try:
                new[name] = kept.form.layer_for(model.get_submodule(name), kept.rank)
            except (AttributeError, UserError) as error:
                raise UserError(f"{where} is of another architecture, layer {name!r}: {error}") from None
        for name, layer in new.items():
            undo.append(replace(model, name, layer))
        yield
    except BaseException:
        for one in reversed(undo):
            one()
        pack_again()
        raise


def _require_same_tensors(
    model: nn.Module, shards: Sequence[Shard], where: str | Path, filled: Collection[str]
) -> None:
    """Raise ``UserError`` where names or shapes differ. One name of a shared tensor is enough.

    A factored layer begins as uninitialised memory, which a missing tensor would leave in the model.
    """
    state, aliases = tensors_of(model), names_of_shared(model)
    found = {name: entry.shape for shard in shards for name, entry in shard.entries.items()}
    for name, value in state.items():
        if name in found and found[name] != tuple(value.shape):
            raise UserError(
                f"{where} is of another architecture: {name} has shape {list(found[name])} there and "
                f"{list(value.shape)} in {type(model).__name__}"
            )
        if not any(alias in found or alias in filled for alias in aliases[name]):
            raise UserError(f"{where} is of another architecture: it lacks {name}")
    for name in sorted(found.keys() - state.keys()):
        raise UserError(f"{where} is of another architecture: {type(model).__name__} has no {name}")


def require_positions(model: nn.Module, names: Iterable[str], read: Callable[[str], Tensor], where: str | Path) -> None:
    """Raise ``UserError`` where the positions of a pivoted layer or of whole rows name no place, or one twice.

    ``names``: tensors of the model's state, of which ``read`` returns the positions.
    ``where``: the checkpoint, for messages.
    """
    for name in names:
        module, _, tensor = name.rpartition(".")
        owner = model.get_submodule(module)
        try:
            if isinstance(owner, Completion) and tensor == "positions":
                owner.require_positions(read(name))
            elif _is_permutation(owner, tensor):
                require_permutation(read(name))
        except UserError as error:
            raise UserError(f"{where} is damaged: {name}: {error}; write it again") from None


def _is_permutation(owner: nn.Module, tensor: str) -> bool:
    """Return whether a buffer holds each of its places once."""
    if isinstance(owner, TransposedCompletion):
        return tensor == "order"
    return isinstance(owner, FactoredEmbedding | TiedLinear) and tensor == "place"


def _require_no_buffer_left_on_meta(model: nn.Module) -> None:
    held = state_of(model).keys()
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in held:
            raise UserError(
                f"the buffer {name} of the model is on the meta device, and no checkpoint holds it; "
                "build the model on another device"
            )


def _put(model: nn.Module, names: Sequence[str], old: Tensor, value: Tensor, as_stored: bool) -> None:
    """Copy ``value`` into the tensor ``old`` of the model, or put a new tensor at all of its ``names``."""
    dtype = value.dtype if as_stored else old.dtype
    is_writable = torch.is_inference_mode_enabled() or not old.is_inference()
    if not old.is_meta and old.dtype == dtype and is_writable:
        old.copy_(value)
        return
    new = value.to(device="cpu" if old.is_meta else old.device, dtype=dtype)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for name in names:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new)
