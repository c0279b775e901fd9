"""A compressed model in one safetensors file: written whole or not at all, checked before it is read."""

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from spectrim.errors import UserError
from spectrim.factored.plan import RankPlan
from spectrim.surgery.replacing import replace
from spectrim.tools import safetensors_stream

FORMAT = "spectrim-1"


def save(
    path: str | Path,
    model: nn.Module,
    plan: RankPlan,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write ``model`` and its plan as safetensors, whole or not at all; floating point numbers in ``dtype`` if given.

    Raises ``UserError`` where the disk is full or the folder cannot be written.
    """
    tensors = {
        name: value.to(dtype) if dtype and value.is_floating_point() else value
        for name, value in _stored(model).items()
    }
    header = {**(metadata or {}), "format": FORMAT, "plan": plan.to_json(), "architecture": _architecture(model)}
    header["digest"] = _digest(tensors, header)
    safetensors_stream.save(Path(path), tensors, header)


def load(path: str | Path, into: nn.Module) -> nn.Module:
    """The model of the file at ``path``: ``into``, built dense by the caller, is factored as the plan says and filled.

    ``into`` itself is changed and returned. Raises ``UserError`` where the file is missing, cut short, altered, not of
    this format, or of another architecture; ``into`` is then as it was.
    """
    metadata = read_metadata(path)
    plan = RankPlan.from_json(metadata["plan"])
    model = copy.deepcopy(into)
    for name, kept in plan.items():
        try:
            replace(model, name, kept.form.layer_for(model.get_submodule(name), kept.rank))
        except (AttributeError, UserError) as error:
            raise UserError(f"{path} is of another architecture, layer {name!r}: {error}") from None
    if _architecture(model) != metadata["architecture"]:
        raise UserError(f"{path} is of another architecture than {type(into).__name__} as built here")
    _require_same_tensors(path, model)
    for name in plan:
        replace(into, name, model.get_submodule(name))
    # Names and shapes agree; only the further names of shared tensors are missing from the file.
    into.load_state_dict(load_file(path), strict=False)
    return into


def _require_same_tensors(path: str | Path, model: nn.Module) -> None:
    """Raise ``UserError`` where names or shapes in the file are not those of ``model``.

    The header alone proves nothing: a factored layer starts as unset memory, which a missing tensor would leave there.
    """
    with safe_open(str(path), "pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    wanted = {name: tuple(value.shape) for name, value in _stored(model).items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            there, here = (f"shape {list(one[name])}" if name in one else "no such tensor" for one in (found, wanted))
            raise UserError(f"{path} is not the model that its header tells of: {name}: {there} in it, {here} expected")


def read_metadata(path: str | Path) -> dict[str, str]:
    """The header of a checkpoint: format, plan, architecture, digest and whatever its writer added.

    Raises ``UserError`` where the file is missing, cut short, altered or not a spectrim checkpoint.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no checkpoint at {path}")
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            digest = _digest({key: file.get_tensor(key) for key in file.keys()}, metadata)  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is cut short or not a safetensors file ({error}); fetch or make it again") from None
    if metadata.get("format") != FORMAT or not {"plan", "architecture", "digest"} <= metadata.keys():
        raise UserError(f"{path} is not a spectrim checkpoint: its header has no plan")
    if metadata["digest"] != digest:
        raise UserError(f"{path} was altered: its content does not match its digest; fetch or make it again")
    return metadata


def tensors_of_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state without what is no tensor, as the extra state of a module may be."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _architecture(model: nn.Module) -> str:
    """Names and shapes of the model's state, and which of the tensors are one and the same."""
    shapes: dict[str, Any] = {}
    first: dict[tuple[int, torch.Size], str] = {}
    for name, value in tensors_of_state(model).items():
        place = (value.data_ptr(), value.shape)
        shared = value.numel() and place in first
        shapes[name] = first[place] if shared else list(value.shape)
        first.setdefault(place, name)
    return hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()[:16]


def _stored(model: nn.Module) -> dict[str, Tensor]:
    """The model's state, each shared tensor once under its first name."""
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, value in tensors_of_state(model).items():
        place = (value.data_ptr(), value.shape)
        if value.numel() and place in seen:
            continue
        seen.add(place)
        tensors[name] = value
    return tensors


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    sha = hashlib.sha256(f"{header.get('plan')}:{header.get('architecture')}".encode())
    for name, value in sorted(tensors.items()):
        sha.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
        sha.update(safetensors_stream.raw(value.detach().cpu()))
    return sha.hexdigest()
