"""What an interrupted training or search goes on from: one safetensors file, written whole or not at all."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from spectrim.errors import UserError
from spectrim.tools import safetensors_stream


def fingerprint(recipe: Any, seed: int, identity: Mapping[str, Any] | None = None) -> str:
    """What tells one training from another: its recipe (a dataclass), its seed, and whatever else makes it this one."""
    return json.dumps({"recipe": asdict(recipe), "seed": seed, **(identity or {})}, sort_keys=True)


def save(path: Path, model: nn.Module, optimizer: torch.optim.SGD, curve: Sequence[dict], run: str) -> None:
    """Write the state after an epoch. Raises ``UserError`` where it cannot; the one of the epoch before is kept."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        buffer = optimizer.state[parameter].get("momentum_buffer")
        if buffer is not None:
            tensors[f"momentum.{name}"] = buffer
    safetensors_stream.save(path, tensors, {"curve": json.dumps(list(curve)), "run": run})


def read(path: Path, run: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What ``save`` or ``safetensors_stream.save`` wrote, where its metadata has this ``run``.

    Raises ``UserError`` where the file is cut short or is another run's.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path} is cut short or not a training's state ({error}); remove it to start anew") from None
    if metadata.get("run") != run:
        raise _of_other_settings(path)
    # Copied out of the mapped file: its tensors are aligned otherwise, and kernels round otherwise on them.
    return {name: value.clone() for name, value in load_file(path).items()}, metadata


def _of_other_settings(path: Path) -> UserError:
    return UserError(f"{path} belongs to a training or search with other settings; remove it or restore those settings")


def resume(path: Path, model: nn.Module, optimizer: torch.optim.SGD, run: str) -> list[dict]:
    """Fill model and optimizer from the state at ``path``, if there is one; returns the curve so far.

    A parameter that changed its shape while training takes the one it has in the file. Raises ``UserError`` where the
    file is cut short or belongs to another training.
    """
    if not path.exists():
        return []
    values, metadata = read(path, run)
    known = {f"model.{name}" for name in model.state_dict()}
    if known != {name for name in values if name.startswith("model.")}:
        raise _of_other_settings(path)
    for name, parameter in model.named_parameters():
        saved = values[f"model.{name}"]
        if saved.shape != parameter.shape:
            parameter.data = saved.to(parameter.device)
        if f"momentum.{name}" in values:
            optimizer.state[parameter]["momentum_buffer"] = values[f"momentum.{name}"].to(parameter.device)
    model.load_state_dict({name[6:]: value for name, value in values.items() if name in known})
    return json.loads(metadata["curve"])
