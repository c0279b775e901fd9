"""Digests of what a computation depends on: tensors, settings, functions, and the code of models."""

import hashlib
from collections.abc import Iterable, Mapping
from functools import partial
from io import BytesIO
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = Tensor | int | float | str | bytes | None


def content(values: Iterable[Any]) -> str:
    """Return a digest of ``values``: tensors, or the extra state of a module, which may be anything.

    Neither address nor version of a tensor is enough: both may stay the same while ``weight.data`` is written to.
    """
    digest = hashlib.blake2b(digest_size=16)
    for value in values:
        _add(digest, value)
    return digest.hexdigest()


def _add(digest: "hashlib.blake2b", value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}{value.device}".encode())
        plain = value.detach().dequantize() if value.is_quantized else value.detach().to_dense()
        digest.update(plain.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        _add(digest, list(value.items()))
    elif isinstance(value, list | tuple):
        for part in value:
            _add(digest, part)
    else:
        digest.update(value.getvalue() if isinstance(value, BytesIO) else repr(value).encode())


def of_file(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> str:
    """Return a digest of what a safetensors file holds: its tensors and its metadata."""
    return content([sorted(tensors.items()), sorted(texts.items())])


def of_model(model: nn.Module) -> list[Any]:
    """Return what the outputs of ``model`` depend on: its structure, state and settings, and the code of its parts."""
    kinds = {type(module): None for module in model.modules()}
    code = [(kind.__qualname__, of_function(kind.forward)) for kind in kinds]
    return [repr(model), model.state_dict(), [_settings(module) for module in model.modules()], code]


def _settings(module: nn.Module) -> list[Any]:
    """Return the numbers and texts among the attributes of a module, but for its mode, which a pass may change."""
    return [(key, own) for key, own in vars(module).items() if key != "training" and isinstance(own, int | float | str)]


def of_function(function: Any) -> list[Any]:
    """Return what a function, a module or another object that is called computes by: its code and its state.

    The functions that it calls by name are not followed.
    """
    if isinstance(function, nn.Module):
        return of_model(function)
    if isinstance(function, partial):
        return [of_function(function.func), function.args, function.keywords]
    if isinstance(function, MethodType):
        return [of_function(function.__func__), _plain(function.__self__)]
    if isinstance(function, FunctionType):
        enclosed = [_plain(cell.cell_contents) for cell in function.__closure__ or () if _is_set(cell)]
        defaults = _plain(function.__defaults__), _plain(function.__kwdefaults__)
        return [function.__qualname__, _of_code(function.__code__), defaults, enclosed]
    call = type(function).__call__
    return [_plain(function), of_function(call) if isinstance(call, FunctionType) else repr(call)]


def _of_code(code: CodeType) -> list[Any]:
    """Return the instructions of a function and of those inside of it, without names of files and line numbers."""
    constants = [_of_code(one) if isinstance(one, CodeType) else repr(one) for one in code.co_consts]
    return [code.co_code.hex(), code.co_names, constants]


def _plain(value: Any, outer: tuple[int, ...] = ()) -> Any:
    """Return a value in a form whose digest is the same in another process. Of an object it holds what is plain.

    ``outer``: identities of the containers that hold ``value``, which may hold themselves.
    """
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, nn.Module):
        return of_model(value)
    if isinstance(value, FunctionType):
        return [value.__qualname__, _of_code(value.__code__)]
    name = getattr(value, "__qualname__", type(value).__qualname__)
    if id(value) in outer:
        return name
    inner = (*outer, id(value))
    if isinstance(value, Mapping):
        return [name, [(_plain(key, inner), _plain(own, inner)) for key, own in value.items()]]
    if isinstance(value, list | tuple):
        return [name, [_plain(own, inner) for own in value]]
    state = getattr(value, "__dict__", {}).items()
    held = [(key, own) for key, own in state if isinstance(own, PLAIN | list | tuple | dict)]
    return [name, [(key, _plain(own, inner)) for key, own in held]]


def _is_set(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (an empty cell raises)
    except ValueError:
        return False
    return True
