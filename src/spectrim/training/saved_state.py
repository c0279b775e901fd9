"""The state of an interrupted training or search: one safetensors file, written whole or not at all."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from spectrim.errors import UserError
from spectrim.tools import safetensors_stream
from spectrim.tools.content import of_file
from spectrim.training.state_lock import locked

# Key of an optimizer's state → its prefix in the file: of SGD the first, of AdamW the others.
_PREFIXES = {"momentum_buffer": "momentum", "exp_avg": "mean", "exp_avg_sq": "square", "step": "step"}


@dataclass(frozen=True)
class StateFile:
    """The file in which a training keeps its state.

    ``path``: a safetensors file.
    ``identity``: what tells this training from others, besides recipe, seed, shapes of the model and data.
    ``read``: counter of the samples that the callbacks of the training read, by split. The file holds what was added
    while training, and a resumed training adds it again, so it counts what an unbroken one counts.
    """

    path: Path
    identity: Mapping[str, Any] = field(default_factory=dict)
    read: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def opened(self, recipe: Any, seed: int, others: Mapping[str, Any]) -> Iterator["TrainingState"]:
        """Lock the file for a training with this recipe (a dataclass) and seed, while the block runs.

        ``others``: further entries of its identity.
        Raises ``UserError`` where another process uses the file or it cannot be written.
        """
        run = json.dumps({"recipe": asdict(recipe), "seed": seed, **self.identity, **others}, sort_keys=True)
        with locked(self.path):
            yield TrainingState(self.path, run, self.read)


class TrainingState:
    """The state of one training in a locked file. ``run`` tells the training from others."""

    def __init__(self, path: Path, run: str, read: Counter[str]) -> None:
        self.path, self.run, self.read = path, run, read
        self.read_before = Counter(read)

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, curve: Sequence[dict]) -> None:
        """Write the state after an epoch. Raises ``UserError`` where that fails; the state before it is kept."""
        tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
        for name, parameter in model.named_parameters():
            for key, prefix in _PREFIXES.items():
                value = optimizer.state[parameter].get(key)
                if value is not None:
                    tensors[f"{prefix}.{name}"] = value
        counted = json.dumps(self.read - self.read_before)
        write(self.path, tensors, {"curve": json.dumps(list(curve)), "run": self.run, "read": counted})

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict]:
        """Fill model and optimizer from the file, if it exists, and return the curve so far.

        A parameter that changed its shape while training takes the shape that it has in the file. Raises ``UserError``
        where the file is truncated or belongs to another training.
        """
        if not self.path.exists():
            return []
        values, metadata = read(self.path, self.run)
        known = {f"model.{name}" for name in model.state_dict()}
        if known != {name for name in values if name.startswith("model.")}:
            raise _of_other_settings(self.path)
        for name, parameter in model.named_parameters():
            saved = values[f"model.{name}"]
            if saved.shape != parameter.shape:
                parameter.data = saved.to(parameter.device)
            for key, prefix in _PREFIXES.items():
                if f"{prefix}.{name}" in values:
                    found = values[f"{prefix}.{name}"]  # torch counts steps on the CPU
                    optimizer.state[parameter][key] = found if key == "step" else found.to(parameter.device)
        model.load_state_dict({name[6:]: value for name, value in values.items() if name in known})
        self.read.update(json.loads(metadata.get("read", "{}")))
        return json.loads(metadata["curve"])


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a state with a digest of its content. Raises ``UserError`` where that fails."""
    safetensors_stream.save(path, tensors, {**metadata, "digest": of_file(tensors, metadata)})


def read(path: Path, run: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a state.

    ``run``: must equal the entry of this name in the metadata.
    Raises ``UserError`` where the file is damaged, cannot be read or belongs to another training or search.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or not a training's state ({error}); remove it to start anew") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged; remove it to start anew") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); make it readable or remove it") from None
    if metadata.get("run") != run:
        raise _of_other_settings(path)
    # Copy the tensors out of the mapped file, where their alignment differs: kernels would round differently.
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    digest = metadata.pop("digest", None)
    if digest not in (None, of_file(tensors, metadata)):  # An older version wrote none.
        raise UserError(f"{path} is damaged; remove it to start anew")
    return tensors, metadata


def _of_other_settings(path: Path) -> UserError:
    return UserError(f"{path} belongs to a training or search with other settings; remove it or restore those settings")
