"""Refuse a model whose layers cannot be replaced, leave a model that runs as it was, and copy one."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spectrim.errors import UserError
from spectrim.factored.dense import attributes_of, dense_kinds, with_article


def eager(model: nn.Module, values: bool = True) -> nn.Module:
    """Return ``model``, or the model that ``torch.compile`` wrapped in it.

    ``values``: whether the model must have values, which one on the meta device has not.

    Raises ``UserError`` for a model whose layers cannot be replaced: scripted, traced, exported, or compiled in part.
    Raises it also for a model with lazy layers, and for one without values that are needed.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"the model is {with_article(model)}, not a torch.nn.Module; pass the eager model")
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


def _is_compiled(module: nn.Module) -> bool:
    # By name: torch._dynamo takes long to import, and no module is compiled before somebody has imported it.
    return type(module).__name__ == "OptimizedModule" and "_orig_mod" in dict(module.named_children())


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore the buffers and the plain attributes of every module when the block ends.

    A forward pass may count its calls, update a buffer or keep an activation. Scripted parts are not restored. Memory:
    a copy of the buffers.
    """
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    before = [(module, attributes_of(module), dict(module.named_buffers(recurse=False))) for module in modules]
    values = {id(buffer): _copy(buffer) for _, _, buffers in before for buffer in buffers.values()}
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            for name in attributes_of(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)
            module._buffers = {name: None for name, buffer in module._buffers.items() if buffer is None} | buffers
            for buffer in buffers.values():
                value = values[id(buffer)]
                if value is not None and not torch.equal(buffer, value):
                    with torch.no_grad():
                        buffer.copy_(value)


def _copy(buffer: Tensor) -> Tensor | None:
    return buffer.clone() if buffer.layout is torch.strided and not buffer.is_quantized else None


def copied(model: nn.Module, known: dict[int, Any] | None = None) -> nn.Module:
    """Return a deep copy of ``model``. An activation that it keeps is copied without its gradient history.

    ``known``: objects that stand for others in the copy, by the id of the other, as for ``copy.deepcopy``.
    """
    with WithoutHistory():
        return copy.deepcopy(model, known)


class WithoutHistory(TorchFunctionMode):
    """Lets tensors with a gradient history be copied, which torch refuses. A gradient pass leaves such activations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            args = (args[0].detach(), *args[1:])
        return func(*args, **(kwargs or {}))
