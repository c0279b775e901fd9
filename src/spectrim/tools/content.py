"""Digests of what a computation depends on: tensors, settings, functions, and the code of models."""

import hashlib
from collections import deque
from collections.abc import Iterable, Mapping
from functools import partial
from io import BytesIO
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from spectrim.tools.sparse import plain_parts

PLAIN = Tensor | int | float | complex | str | bytes | torch.dtype | torch.device | None
TORCH_OWN = frozenset(vars(nn.Module()))  # parameters, buffers, submodules, hooks and mode of every module
HELD = list | tuple | deque | range | dict | set | frozenset | np.ndarray | np.generic
HOOKS = "_forward_pre_hooks", "_forward_hooks"
OF_NO_FORWARD = {"generation_config"}  # of transformers; it holds a hash of this process


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return the parameters, persistent buffers and extra states of ``model`` by name.

    The names are those of its modules. ``state_dict`` may say something else, as a hook or an override of it may rename
    entries or leave some out. A file or a digest would then miss weights.
    """
    state: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        module._save_to_state_dict(state, name and f"{name}.", keep_vars=True)
    return state


def of_state(model: nn.Module) -> str:
    """Return a digest of the values of ``state_of``."""
    return content(state_of(model).values())


def of_extra_state(model: nn.Module) -> str:
    """Return a digest of the extra states of ``model`` that are no tensors; empty where it has none."""
    extra = {name: _plain(value) for name, value in state_of(model).items() if not isinstance(value, Tensor)}
    return content([extra]) if extra else ""


def content(values: Iterable[Any]) -> str:
    """Return a digest of ``values``: tensors, or the extra state of a module, which may be anything.

    Neither address nor version of a tensor is enough: both may stay the same while ``weight.data`` is written to.
    """
    digest = hashlib.blake2b(digest_size=16)
    for value in values:
        _add(digest, value)
    return digest.hexdigest()


def _add(digest: "hashlib.blake2b", value: Any) -> None:
    if is_traceable_wrapper_subclass(value):  # as a quantised weight: it is made of plain tensors
        names, context = value.__tensor_flatten__()
        _add(digest, [type(value).__qualname__, context, *(getattr(value, name) for name in names)])
    elif isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}{value.device}".encode())
        if len(parts := plain_parts(value)) > 1:  # a sparse tensor may be too large to be written out
            _add(digest, [str(value.layout), *parts])
            return
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


def of_model(model: nn.Module, outer: frozenset[int] = frozenset()) -> list[Any]:
    """Return what the outputs of ``model`` depend on: its structure, state and settings, and the code of its parts.

    ``outer``: as for ``_plain``.
    """
    modules = list(model.modules())
    outer = outer.union(map(id, modules))
    kinds = {kind for module in modules for kind in type(module).__mro__} - {nn.Module, object}
    code = sorted(content(_of_class(kind, outer)) for kind in kinds)
    return [repr(model), state_of(model), [_settings(module, outer) for module in modules], code]


def _of_class(kind: type, outer: frozenset[int]) -> list[Any]:
    """Return the functions of a class, properties and static methods among them, and its numbers and texts."""
    found: list[Any] = [kind.__qualname__]
    for name, own in vars(kind).items():
        function = getattr(own, "fget", getattr(own, "__func__", own))
        if isinstance(function, FunctionType):
            found.append(of_function(function, outer))
        elif isinstance(own, int | float | str) and not name.startswith("__"):
            found.append([name, own])
    return found


def _settings(module: nn.Module, outer: frozenset[int]) -> list[Any]:
    """Return the attributes of a module but for its mode, the buffers outside of its state, and its hooks."""
    own = {name: vars(module)[name] for name in sorted(vars(module).keys() - TORCH_OWN - OF_NO_FORWARD)}
    hooks = [of_function(hook, outer) for kind in HOOKS for hook in vars(module).get(kind, {}).values()]
    return [_plain(own, outer), list(module.named_buffers(recurse=False)), hooks]


def of_function(function: Any, outer: frozenset[int] = frozenset()) -> list[Any]:
    """Return what a function, a module or another object that is called computes by: its code and its state.

    The functions that it calls by name are not followed.

    ``outer``: as for ``_plain``.
    """
    if isinstance(function, nn.Module):
        return of_model(function, outer)
    outer = outer | {id(function)}
    if isinstance(function, partial):
        return [of_function(function.func, outer), _plain(function.args, outer), _plain(function.keywords, outer)]
    if isinstance(function, MethodType):
        return [of_function(function.__func__, outer), _plain(function.__self__, outer)]
    if isinstance(function, FunctionType):
        enclosed = [_plain(cell.cell_contents, outer) for cell in function.__closure__ or () if _is_set(cell)]
        defaults = _plain(function.__defaults__, outer), _plain(function.__kwdefaults__, outer)
        return [function.__qualname__, _of_code(function.__code__), defaults, enclosed]
    call = type(function).__call__
    return [_plain(function, outer - {id(function)}), of_function(call) if isinstance(call, FunctionType) else ""]


def _of_code(code: CodeType) -> list[Any]:
    """Return the instructions of a function and of those inside of it, without names of files and line numbers."""
    constants = [_of_code(one) if isinstance(one, CodeType) else _plain(one) for one in code.co_consts]
    return [code.co_code.hex(), code.co_names, constants]


def _plain(value: Any, outer: frozenset[int] = frozenset()) -> Any:
    """Return a value in a form whose digest is the same in another process. Of an object it holds what is plain.

    ``outer``: identities of what holds ``value``, which may hold itself: only its name is returned.
    """
    if isinstance(value, PLAIN):
        return value
    name = getattr(value, "__qualname__", type(value).__qualname__)
    if id(value) in outer or isinstance(value, type):
        return name
    if isinstance(value, nn.Module | FunctionType | MethodType | partial):
        return of_function(value, outer)
    inner = outer | {id(value)}
    if isinstance(value, Mapping):
        return [name, [(_plain(key, inner), _plain(own, inner)) for key, own in value.items()]]
    if isinstance(value, list | tuple | deque | range):
        return [name, [_plain(own, inner) for own in value]]
    if isinstance(value, set | frozenset):
        return [name, sorted(content([_plain(own, inner)]) for own in value)]
    if isinstance(value, np.ndarray | np.generic):
        return [name, str(value.dtype), value.shape, "" if value.dtype.hasobject else value.tobytes()]
    slots = [slot for kind in type(value).__mro__ for slot in getattr(kind, "__slots__", ()) if hasattr(value, slot)]
    state = {slot: getattr(value, slot) for slot in slots if not slot.startswith("__")} | getattr(value, "__dict__", {})
    held = [(key, own) for key, own in state.items() if isinstance(own, PLAIN | HELD)]
    return [name, [(key, _plain(own, inner)) for key, own in held]]


def _is_set(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (an empty cell raises)
    except ValueError:
        return False
    return True
