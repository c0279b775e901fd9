"""Refuse a model whose layers cannot be replaced, leave a model that runs as it was, and copy one."""

import copy
import operator
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spectrim.batches import acts_on_mode
from spectrim.errors import UserError, first_line
from spectrim.factored.base import FactoredLayer
from spectrim.factored.dense import attributes_of, dense_kinds, with_article
from spectrim.tools.alone import alone
from spectrim.tools.content import content as content_of
from spectrim.tools.sparse import BY_COLUMNS, BY_ROWS

# The attributes in which a module of torch holds its hooks on calls.
HOOKS = [name for name in vars(nn.Module()) if name.startswith(("_forward_", "_backward_", "_is_full_backward_"))]

FITTED = FactoredLayer, nn.modules.batchnorm._BatchNorm  # what a fit to the dense model writes to


def eager(model: nn.Module, values: bool = True) -> nn.Module:
    """Return ``model``, or the model that ``torch.compile`` wrapped in it.

    ``values``: whether the model must have values, which one on the meta device has not.

    Raises ``UserError`` for a model whose layers cannot be replaced: scripted, traced, exported, or compiled in part.
    Raises it also for a model with lazy layers, and for one without values that are needed.
    """
    if not isinstance(model, nn.Module):
        loaded = ", with its weights loaded" if values else ""
        raise UserError(f"the model is {with_article(model)}, not a torch.nn.Module; pass the eager model{loaded}")
    if _is_compiled(model):
        model = model.get_submodule("_orig_mod")
    if isinstance(model, torch.jit.ScriptModule):
        raise UserError("a scripted or traced model has no layers to replace; pass the eager model it was made from")
    if isinstance(model, torch.fx.GraphModule) and not any(isinstance(one, dense_kinds()) for one in model.modules()):
        raise UserError("an exported model has no layers to replace; pass the eager model it was made from")
    for name, module in model.named_modules():
        if _is_compiled(module) or getattr(module, "_compiled_call_impl", None) is not None:
            where = f"its part {name}" if name else "the model"
            raise UserError(f"{where} is compiled; pass an eager model and compile the compressed one")
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if torch.nn.parameter.is_lazy(value):
            raise UserError(f"{name} of the model has no shape yet; run the model once on a batch first")
        if value.is_meta and values:
            raise UserError(f"{name} of the model is on the meta device, without values; give a model with values")
    return model


def require_gradients(model: nn.Module) -> None:
    """Raise ``UserError`` where a parameter of ``model`` can have no gradient, whatever it requires."""
    for name, value in model.named_parameters():
        if value.is_inference():
            raise UserError(
                f"{name} of the model was made inside of torch.inference_mode, which allows no gradient; "
                "build the model outside of it"
            )


def require_default_device() -> None:
    """Raise ``UserError`` where torch makes new tensors elsewhere than on the CPU, where sums and seeds are kept."""
    if (device := torch.get_default_device()).type != "cpu":
        raise UserError(
            f"torch.set_default_device puts new tensors on {device}; call spectrim inside of "
            "`with torch.device('cpu'):`, and the model stays on its device"
        )


def require_default_dtype() -> None:
    """Raise ``UserError`` where torch makes new tensors of 16 bits, in which a budget would be missed by rounding."""
    if (dtype := torch.get_default_dtype()).itemsize < torch.float32.itemsize:
        raise UserError(
            f"torch.set_default_dtype makes new tensors {dtype}, too coarse to count in; call "
            "torch.set_default_dtype(torch.float32) before, and the model keeps its precision"
        )


def _is_compiled(module: nn.Module) -> bool:
    # By name: torch._dynamo takes long to import, and no module is compiled before somebody has imported it.
    return type(module).__name__ == "OptimizedModule" and "_orig_mod" in dict(module.named_children())


def versions(model: nn.Module) -> tuple[Any, ...]:
    """Return a count of the changes of each parameter, and what the buffers hold. It tells most changes, cheaply.

    A forward pass may write to a buffer. Where it comes back, as in ``unchanged``, nothing has changed.
    """
    counts = [-1 if value.is_inference() else value._version for value in model.parameters()]
    return *counts, content_of(list(model.buffers()))


@contextmanager
def unchanged(model: nn.Module, fitted: bool = False) -> Iterator[None]:
    """Restore the buffers, the plain attributes and the hooks of every module when the block ends.

    Another thread that enters such a block waits (``alone``).

    ``fitted``: whether the block fits ``model``: factored layers and BatchNorm then keep what is written to them.
    """
    with alone():
        restore = restorer(model, fitted)
        try:
            yield
        finally:
            restore()


def restorer(model: nn.Module, fitted: bool = False) -> Callable[[], None]:
    """Return a function that gives ``model`` its present state again, as often as it is called.

    A forward pass may count its calls, update a buffer, keep an activation or append to a list. Tensors, lists,
    dictionaries, sets and deques that an attribute holds get their contents back, also where they lie in one another.
    So do the rows of an embedding with ``max_norm``, which looking them up scales, and the weights of a module with a
    ``train`` of its own, which may merge an adapter. Hooks that a first pass registers go with the attribute that tells
    of them, as in models of transformers that return hidden states. Scripted parts and objects of other classes are not
    restored.
    Memory: a copy of the buffers and of these tensors.

    ``fitted``: leave out factored layers and BatchNorm.
    """
    left = {part for module in model.modules() if fitted and isinstance(module, FITTED) for part in module.modules()}
    modules = [own for own in model.modules() if own not in left and not isinstance(own, torch.jit.ScriptModule)]
    before = [(module, attributes_of(module), dict(module.named_buffers(recurse=False))) for module in modules]
    held: dict[int, Any] = {}
    for module, attributes, buffers in before:
        hooks = (vars(module).get(name) for name in HOOKS)
        _gather([*buffers.values(), *attributes.values(), *hooks], held)
        # What is written to these tensors leaves the count of ``versions``.
        held |= {id(weight): weight.data for weight in _written_by_passes(module)}
    contents = [(value, _contents(value)) for value in held.values()]

    def restore() -> None:
        for module, attributes, buffers in before:
            for name in attributes_of(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)
            module._buffers = {name: None for name, buffer in module._buffers.items() if buffer is None} | buffers
        for value, content in contents:
            _restore(value, content)

    return restore


def _written_by_passes(module: nn.Module) -> list[nn.Parameter]:
    """Return the rows of an embedding with ``max_norm``, or the weights inside of a module that ``acts_on_mode``."""
    if acts_on_mode(module):
        return list(module.parameters())
    return list(module.parameters(recurse=False)) if getattr(module, "max_norm", None) is not None else []


def _gather(values: Iterable[Any], held: dict[int, Any]) -> None:
    """Add the tensors and containers among ``values``, and those inside of them, to ``held`` by their id."""
    for value in values:
        if id(value) in held or isinstance(value, nn.Parameter):
            continue
        if isinstance(value, Tensor | list | tuple | dict | set | deque):
            held[id(value)] = value
            if not isinstance(value, Tensor):
                _gather(value.values() if isinstance(value, dict) else value, held)


def _contents(value: Any) -> Any:
    """Return a copy of a tensor, or what a container holds; None for a tensor that cannot be compared."""
    if isinstance(value, Tensor):
        plain = value.layout is torch.strided and not (value.is_quantized or value.is_nested or value.is_meta)
        return value.detach().clone() if plain else None
    return list(value.items() if isinstance(value, dict) else value)


@torch.no_grad()
def _restore(value: Any, content: Any) -> None:
    """Write ``content`` back into ``value``, where it has changed."""
    if isinstance(value, Tensor):
        if content is not None and not torch.equal(value, content):
            value.copy_(content)
        return
    now = _contents(value)
    if isinstance(value, tuple) or (len(now) == len(content) and all(map(_is_same, now, content))):
        return
    value.clear()
    if isinstance(value, dict):
        for key, item in content:
            value[key] = item
    elif isinstance(value, set):
        value.update(content)
    else:
        value.extend(content)


def _is_same(one: Any, other: Any) -> bool:
    """Return whether two entries of a container are the same objects. An entry of a dictionary is a new pair."""
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        return all(map(operator.is_, one, other))
    return one is other


def copied(model: nn.Module, known: dict[int, Any] | None = None) -> nn.Module:
    """Return a deep copy of ``model``. An activation that it keeps is copied without its gradient history.

    ``known``: objects that stand for others in the copy, by the id of the other, as for ``copy.deepcopy``.

    Raises ``UserError`` where a part of the model allows no copy, such as a lock or an open file.
    """
    with copying(model):
        return deep_copy(model, known)


def deep_copy(model: nn.Module, known: dict[int, Any] | None = None) -> nn.Module:
    """Return ``copy.deepcopy(model, known)``, in which scripted parts hold parameters as those of ``model`` do.

    Torch would copy them by operations that have a gradient.
    """
    with torch.no_grad():
        result: nn.Module = copy.deepcopy(model, known)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            for own, before in zip(result.get_submodule(name).parameters(), module.parameters(), strict=True):
                own.requires_grad_(before.requires_grad)
    return result


@contextmanager
def copying(model: nn.Module) -> Iterator[None]:
    """Copy parts of ``model`` inside the block. Raises ``UserError`` as ``copied`` does."""
    try:
        with _WithoutHistory():
            yield
    except RecursionError:
        raise UserError(
            f"the modules of {with_article(model)} lie too deep in one another to be copied; "
            f"raise Python's limit by sys.setrecursionlimit, which is {sys.getrecursionlimit()} now"
        ) from None
    except Exception as error:  # whatever the class of a part raises
        raise UserError(
            f"{_uncopied(model)} cannot be copied ({first_line(error)}), and compression works on copies; "
            "make it when it is first needed, or give its class a __deepcopy__"
        ) from error


def _uncopied(model: nn.Module) -> str:
    """Return the name of the first attribute of ``model`` that cannot be copied, or its class where there is none."""
    parts = {id(part): part for part in [*model.modules(), *model.parameters(), *model.buffers()]}
    for name, module in model.named_modules():
        for attribute, value in attributes_of(module).items():
            try:
                with _WithoutHistory():
                    copy.deepcopy(value, dict(parts))
            except Exception:
                return f"the attribute {name and f'{name}.'}{attribute} of the model, {with_article(value)},"
    return with_article(model)


class _WithoutHistory(TorchFunctionMode):
    """Let tensors be copied that torch refuses: with a gradient history, as a pass leaves them, or sparse by rows."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            args = (args[0].detach(), *args[1:])
        if func is Tensor.__deepcopy__ and args[0].layout in BY_ROWS + BY_COLUMNS:
            return args[1].setdefault(id(args[0]), args[0].clone())
        return func(*args, **(kwargs or {}))
