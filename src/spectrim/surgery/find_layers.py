"""Which layers of a model can be replaced by factored ones, and why each other one cannot."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spectrim.batches import Inputs, device_of, evaluating, forward, tensors_of, to_device
from spectrim.errors import UserError
from spectrim.factored.dense import dense_kinds


def factorable(
    model: nn.Module, example: Inputs, embeddings: bool = False
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers (``layers.dense_kinds``) that can be replaced, in the model's order, and why each other one is not.

    A layer stays dense where it or its weight is shared, where its class has a ``forward`` of its own, where the model
    does not call it on ``example`` (one batch of inputs), or where the model reads its weight without calling it, as
    attention does with its output projection. So does an embedding that renormalises what it looks up, or whose ids are
    not among the inputs: positions, which calibration may not have reached. Without ``embeddings`` none is looked at.
    Raises ``UserError`` where the whole model is one such layer: it has no parent in which it could be replaced.
    """
    kinds = dense_kinds()
    if isinstance(model, kinds):
        raise UserError(f"the model is a single {type(model).__name__}; pass torch.nn.Sequential(model) instead")
    places = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    layers: dict[str, nn.Module] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, kinds) or (isinstance(module, nn.Embedding) and not embeddings):
            continue
        if places[module] > 1 or owners[id(module.weight)] > 1:
            left[name] = "its weight is shared with another layer"
        elif type(module).forward not in [kind.forward for kind in kinds]:
            left[name] = f"{type(module).__name__} has a forward of its own"
        elif torch.nn.utils.parametrize.is_parametrized(module) or not isinstance(module.weight, nn.Parameter):
            left[name] = "its weight is computed from other parameters"
        elif isinstance(module, nn.Embedding) and not _is_plain(module):
            left[name] = "it renormalises what it looks up, or has gradients of its own kind"
        else:
            layers[name] = module
    for name, reason in _unfit_for_replacement(model, layers, example).items():
        del layers[name]
        left[name] = reason
    return layers, left


def _is_plain(embedding: nn.Embedding) -> bool:
    return embedding.max_norm is None and not embedding.scale_grad_by_freq and not embedding.sparse


class _Watch(TorchFunctionMode):
    """Notes which layers are called, and whose weight is used or looked up while their own ``forward`` is not running.

    And which embeddings are called on anything but a part of ``inputs``. Without hooks: nn.TransformerEncoderLayer,
    which then reads the weights of its layers, does not where it sees any.
    """

    def __init__(self, layers: Mapping[str, nn.Module], inputs: Inputs) -> None:
        super().__init__()
        self.given = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(inputs)}
        self.owner_of = {id(layer.weight): name for name, layer in layers.items()}
        self.name_of = {id(layer): name for name, layer in layers.items()}
        self.running: list[str | None] = [None]
        self.called, self.read, self.on_others = set[str](), set[str](), set[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            for item in value if isinstance(value, tuple | list) else (value,):
                self._note(self.owner_of.get(id(item)))
        return func(*args, **(kwargs or {}))

    @contextmanager
    def of_modules(self) -> Iterator[None]:
        """Watch calls of Linear and Conv2d, and ``layer.weight`` and ``layer.bias``, inside the block."""
        look_up = nn.Module.__getattr__

        def looked_up(module: nn.Module, attribute: str) -> Any:
            if attribute in ("weight", "bias"):
                self._note(self.name_of.get(id(module)))
            return look_up(module, attribute)

        with ExitStack() as stack:
            stack.callback(setattr, nn.Module, "__getattr__", look_up)
            nn.Module.__getattr__ = looked_up  # type: ignore[method-assign]
            for kind in dense_kinds():
                stack.callback(setattr, kind, "forward", kind.forward)
                kind.forward = self._noting_calls(kind.forward)
            yield

    def _noting_calls(self, forward_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def called(module: Any, *given: Tensor, **named: Tensor) -> Tensor:
            name = self.name_of.get(id(module))
            self.called |= {name} if name else set()
            if name and isinstance(module, nn.Embedding) and not self._are_given((*given, *named.values())):
                self.on_others.add(name)
            self.running.append(name)
            try:
                return forward_of(module, *given, **named)
            finally:
                self.running.pop()

        return called

    def _are_given(self, values: tuple[Tensor, ...]) -> bool:
        return all(value.untyped_storage().data_ptr() in self.given for value in values)

    def _note(self, owner: str | None) -> None:
        if owner is not None and owner != self.running[-1]:
            self.read.add(owner)


def _unfit_for_replacement(model: nn.Module, layers: Mapping[str, nn.Module], example: Inputs) -> dict[str, str]:
    inputs = to_device(example, device_of(model))
    watch = _Watch(layers, inputs)
    with evaluating(model), torch.no_grad(), watch.of_modules(), watch:
        forward(model, inputs)
    unfit = {name: "the model does not call it" for name in layers if name not in watch.called}
    unfit |= {name: "the numbers that it looks up are not among the inputs" for name in watch.on_others}
    return unfit | {name: "the model reads its weight" for name in layers if name in watch.read}
