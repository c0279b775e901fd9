"""A compressed model in one safetensors file, which is checked before it is loaded."""

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from spectrim.checkpoints.filling import architecture_of, fill, names_of_shared, require_stored, tensors_of
from spectrim.errors import UserError
from spectrim.factored import linalg
from spectrim.factored.layers import FactoredLinear
from spectrim.factored.plan import RankPlan
from spectrim.surgery.reopening import factored_layers
from spectrim.tools import digests, safetensors_stream
from spectrim.tools.content import of_extra_state
from spectrim.tools.safetensors_stream import Shard

FORMAT = "spectrim-1"
EVERY_SIZE = "spectrim-every-size-1"  # all components (``every_size``)
EXTRA = "extra_state"  # the digest of what modules add to the state that is no tensor, which the file does not hold
TORCH = "pt"  # the format that transformers wants a file to name


def save(
    path: str | Path,
    model: nn.Module,
    plan: RankPlan,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    beside: Mapping[str, Tensor] | None = None,
) -> None:
    """Write ``model`` and its plan to a safetensors file, atomically. Equal models give equal bytes.

    ``metadata``: further text for the header; its ``format``, if any, is ``TORCH``.
    ``beside``: tensors that the file holds in addition to those of the model.
    ``dtype``: precision of the floating-point numbers in the file; by default that of the model.

    Raises ``UserError`` where a layer is not as the plan says, or a number does not fit ``dtype``. Raises it also where
    the disk is full or the folder cannot be written.
    """
    _require_ranks(model, plan)
    tensors = {
        name: _in_precision(name, value, dtype) if dtype and value.is_floating_point() else value
        for name, value in stored(model).items()
    }
    header = {"format": FORMAT, **(metadata or {}), "plan": plan.to_json(), "architecture": architecture_of(model)}
    if extra := of_extra_state(model):
        header[EXTRA] = extra
    write(path, tensors | dict(beside or {}), header)


def stored(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of ``model``, a shared one by its first name.

    Raises ``UserError`` where one of them is no plain tensor.
    """
    require_stored(model)
    aliases = names_of_shared(model)
    return {name: value for name, value in tensors_of(model).items() if aliases[name][0] == name}


def write(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write ``tensors`` with ``header`` and the digest of both, atomically (``safetensors_stream.save``)."""
    digest = _digest(((name, tensors[name].detach().cpu()) for name in sorted(tensors)), header)
    safetensors_stream.save(Path(path), tensors, {**header, "digest": digest})


def _in_precision(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    try:
        return linalg.in_precision(value, dtype)
    except UserError as error:
        raise UserError(f"{name} cannot be saved: {error}") from None


def _require_ranks(model: nn.Module, plan: RankPlan) -> None:
    """Raise ``UserError`` where the file could not be read back: a layer has an adapter, or one was merged into it."""
    layers = factored_layers(model)
    for name, kept in plan.items():
        layer = layers.get(name)
        if layer is None:
            raise UserError(f"the model has no factored layer {name}; pass the compressed model, without an adapter")
        if isinstance(layer, FactoredLinear) and layer.rank != kept.rank:
            raise UserError(
                f"layer {name} has rank {layer.rank}, the plan says {kept.rank}; after a merged adapter a model of "
                "transformers is saved by save_pretrained"
            )


def load(path: str | Path, into: nn.Module, sha256: str | None = None) -> nn.Module:
    """Factor ``into`` by the plan in the file at ``path``, fill it with the saved weights, and return it.

    ``into``: the model, built dense. It decides precision and device; on the meta device, the weights go to the CPU.
    ``sha256``: digest that the file must have, if given.

    Raises ``UserError`` where the file is missing, cut short, altered, not of this format, or of another architecture;
    ``into`` is then unchanged.
    """
    path = Path(path)
    if sha256 is not None:
        digests.require(path, sha256)
    return filled(into, verified(path))


def filled(into: nn.Module, shard: Shard, *, as_stored: bool = False) -> nn.Module:
    """Factor ``into`` by the plan of a verified checkpoint, fill it with the saved weights, and return it.

    ``as_stored``: whether the numbers keep the precision of the file.

    Raises ``UserError`` where the checkpoint is of another architecture; ``into`` is then unchanged.
    """
    architecture = shard.metadata["architecture"]
    extra = shard.metadata.get(EXTRA)
    return fill(
        into, plan_in(shard), [shard], shard.path, architecture=architecture, extra_state=extra, as_stored=as_stored
    )


def plan_in(shard: Shard) -> RankPlan:
    """Return the plan of a verified checkpoint. Raises ``UserError`` for one that this version cannot read."""
    try:
        return RankPlan.from_json(shard.metadata["plan"])
    except UserError as error:
        raise UserError(f"{shard.path}: {error}") from None


def verified(path: Path, formats: Collection[str] = (FORMAT, TORCH)) -> Shard:
    """Return a checkpoint, read once to compare it with its digest.

    Its metadata hold format, plan, architecture, digest and what its writer added.

    ``formats``: those that the caller can read.

    Raises ``UserError`` where the file is missing, cut short, altered or not a spectrim checkpoint.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint at {path}")
    shard = Shard.at(path)
    metadata = shard.metadata
    found = metadata.get("format")
    if re.fullmatch(r"spectrim(-every-size)?-\d+", str(found)) and found not in (FORMAT, EVERY_SIZE):
        raise UserError(f"{path} has the format {found}, which a newer spectrim wrote; update spectrim")
    if found not in (FORMAT, TORCH, EVERY_SIZE) or not {"plan", "architecture", "digest"} <= metadata.keys():
        raise UserError(f"{path} is not a spectrim checkpoint: its header has no plan")
    if found not in formats:
        asked = "pass params_kept=, one of them" if found == EVERY_SIZE else "leave params_kept out"
        raise UserError(f"{path} holds {'every size' if found == EVERY_SIZE else 'one size'}; {asked}")
    if metadata["digest"] != _digest(((name, shard.read(name)) for name in sorted(shard.entries)), metadata):
        raise UserError(f"{path} was altered: its content does not match its digest; fetch or make it again")
    return shard


def _digest(tensors: Iterable[tuple[str, Tensor]], header: Mapping[str, str]) -> str:
    """Return the digest of plan, architecture, sizes if any, and tensors, which are sorted by name."""
    sha = hashlib.sha256(f"{header.get('plan')}:{header.get('architecture')}{header.get('sizes', '')}".encode())
    for name, value in tensors:
        sha.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
        sha.update(safetensors_stream.raw(value))
    return sha.hexdigest()
