"""The model that a command names: a decoder of transformers, or a module that a function of the user's makes."""

import ast
import importlib
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectrim.checkpoints import single_file
from spectrim.errors import UserError, first_line
from spectrim.fetch import pretrained
from spectrim.fetch.cache import unpacked
from spectrim.tools import digests, torchvision_shim
from spectrim.tools.free_memory import free_memory
from spectrim.tools.safetensors_stream import Shard

FACTORY = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")
FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer*", "*.txt", "*.jinja", "*.model"]
# Memory of a selection over that of the model: the model, the copy, and two blocks of layers; then all decompositions.
LEAST, MOST = 3, 12
BLOCK = 8  # layers at once, where not all decompositions fit
BATCH = 8  # samples, where they do; a pass through a decoder with 8 blocks of text takes more memory than the model


def is_factory(name: str) -> bool:
    """Return whether ``name`` is package.module:factory and not a path."""
    return FACTORY.fullmatch(name) is not None and not Path(name).exists()


def made(name: str, settings: Sequence[str], weights: Path | None) -> nn.Module:
    """Import the module that ``name`` names, call its factory, and fill the model with ``weights``.

    Raises ``UserError`` for whatever fails.
    """
    arguments = dict(_setting(one) for one in settings)
    factory = imported(name, name)
    try:
        model = factory(**arguments)
    except Exception as error:  # foreign code raises anything
        raise UserError(f"{name} cannot be made: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{name} returns a {type(model).__name__}, not a torch.nn.Module")
    if weights is not None:
        _fill(model, weights)
    return model.eval()


def imported(name: str, subject: str) -> Any:
    """Import the module of package.module:function and return its function. The current folder is searched, too.

    ``subject``: begins the message of the ``UserError`` that is raised where this fails.
    """
    module, _, function = name.partition(":")
    if module.endswith(".py"):
        raise UserError(f"{subject} names a file; name its module: {module.removesuffix('.py')}:{function}")
    with suppress(UserError):  # where torchvision is not installed
        torchvision_shim.prepare()
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except Exception as error:  # foreign code raises anything
        raise UserError(f"{subject} cannot be imported: {type(error).__name__}: {first_line(error)}") from error


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name.isidentifier() or not equals:
        raise UserError(f"--with {text} is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # a word without quotes


def _fill(model: nn.Module, path: Path) -> None:
    """Load weights from a safetensors file: a state dict, or what spectrim has saved."""
    if path.suffix != ".safetensors":
        raise UserError(
            f'--weights {path} is no safetensors file, and a pickle can run any code; convert it: python -c "import '
            f"torch, safetensors.torch as s; s.save_file(torch.load('{path}', weights_only=True), "
            f"'{path.with_suffix('.safetensors')}')\""
        )
    shard = Shard.at(path)
    if shard.metadata.get("format") in (single_file.FORMAT, single_file.EVERY_SIZE):
        single_file.load(path, model)
        return
    state = {name: shard.read(name) for name in shard.entries}
    ours = model.state_dict()
    for what, names in (("lacks", ours.keys() - state.keys()), ("has no place for", state.keys() - ours.keys())):
        if names:
            subject = f"--weights {path}" if what == "lacks" else type(model).__name__
            some = ", ".join(sorted(names)[:3]) + (" and others" if len(names) > 3 else "")
            raise UserError(f"{subject} {what} {some}; give the weights of this model")
    for name, value in ours.items():
        if value.shape != state[name].shape:
            shapes = f"{list(state[name].shape)}, and {list(value.shape)} in the model"
            raise UserError(f"--weights {path}: {name} has shape {shapes}; set the factory's arguments by --with")
    model.load_state_dict(state)


def folder_of(name: str) -> Path:
    """Return the folder of a decoder: as given, packaged, or fetched from the hub without code and pickles.

    Raises ``UserError`` where there is none.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name in pretrained.PACKAGED:
        pretrained.library()
        return unpacked(pretrained.PACKAGED[name])
    hub = pretrained.imported("huggingface_hub")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=FILES, local_files_only=not pretrained.hub_answers()))
    except Exception as error:  # the hub raises its own errors, those of its client, and ValueError for an odd name
        raise UserError(
            f"{name} is no folder and cannot be had from the Hugging Face hub ({first_line(error)}); give a folder, a "
            "name such as owner/name, or package.module:factory"
        ) from None


@dataclass(frozen=True)
class Memory:
    """The bytes that a selection may take, and those of the weights."""

    free: int
    weights: int

    @property
    def streamed(self) -> bool:
        """Whether the model itself is too large, so that it is compressed tensor by tensor."""
        return self.free < LEAST * self.weights

    @property
    def layers_at_once(self) -> int | None:
        """Number of layers whose decompositions are held at once; None: all."""
        return BLOCK if self.free < MOST * self.weights else None

    @property
    def batch_size(self) -> int:
        """Number of samples in a batch: one where memory is short."""
        return BATCH if self.layers_at_once is None else 1


def memory_for(weights: int, gib: float | None) -> Memory:
    """Return the memory for a model. ``gib``: what the user allows; None: what is free now."""
    return Memory(free_memory() if gib is None else int(gib * 2**30), weights)


def bytes_of(folder: Path) -> int:
    """Return the bytes of the weights of a checkpoint."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def decoder(folder: Path, name: str, device: torch.device) -> tuple[nn.Module, Any]:
    """Return the decoder in ``folder`` and its tokenizer. Raises ``UserError`` for another kind of model."""
    config = pretrained.opened("AutoConfig", str(folder))
    known = pretrained.library().models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    kinds = getattr(config, "architectures", None) or []
    if kinds and not set(kinds) & set(known.values()):
        raise UserError(f"{name} is a {kinds[0]}, and this command takes decoders; call spectrim.compress from Python")
    model = pretrained.opened("AutoModelForCausalLM", str(folder))
    return model.eval().to(device), pretrained.tokenizer(str(folder))


def digests_of(paths: Sequence[Path]) -> dict[str, str]:
    """Return the sha256 of each file by its name."""
    return {path.name: digests.of_file(path) for path in paths}
