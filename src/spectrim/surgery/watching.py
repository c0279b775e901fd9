"""Watch how a model uses its layers while it runs."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spectrim.batches import Inputs, first_argument, tensors_of
from spectrim.errors import UserError
from spectrim.factored.dense import dense_kinds
from spectrim.tools.alone import alone
from spectrim.tools.sparse import plain_parts


class Watch(TorchFunctionMode):
    """Note how a model uses ``layers`` while it runs on ``inputs``.

    ``called``: the layers that are called. ``read``: the layers whose weight or bias is used while their own
    ``forward`` is not running. ``on_others``: the embeddings that are called on anything but a part of ``inputs``.
    ``on_one``: the convolutions that are called on a single image, without a dimension of samples. ``transformed``: the
    layers that are called inside of a transform of torch.func. ``elsewhere``: the layers that another thread calls.

    It raises ``UserError`` where the model writes to one of ``parameters``, by name, and leaves that one as it was.
    No later pass over the same weights would be the same.

    It uses no hooks: nn.TransformerEncoderLayer reads the weights of its layers only where it sees none. Other threads
    may run models meanwhile, this one among them.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], inputs: Inputs, parameters: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.stored = {_place(own): (name, own) for name, own in (parameters or {}).items() if _place(own)}
        self.given = {_address(part) for tensor in tensors_of(inputs) for part in plain_parts(tensor)}
        self.owners_of: dict[int, set[str]] = {}
        for name, layer in layers.items():
            self.owners_of.setdefault(id(layer.weight), set()).add(name)
        self.name_of = {id(layer): name for name, layer in layers.items()}
        self._thread, self._running = threading.get_ident(), dict[int, list[str | None]]()
        self.called, self.read, self.on_others, self.on_one, self.transformed, self.elsewhere = (
            set[str]() for _ in range(6)
        )

    @property
    def running(self) -> list[str | None]:
        """The layers that are running in this thread, the innermost last; None stands for other code."""
        return self._running.setdefault(threading.get_ident(), [None])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in (*args, *(kwargs or {}).values()):
            for item in value if isinstance(value, tuple | list) else (value,):
                self._note(self.owners_of.get(id(item), set()))
        target = (kwargs or {}).get("out", args[0] if args and _writes(func) else None)
        if isinstance(target, Tensor) and _place(target) in self.stored:
            return self._unless_it_changes(*self.stored[_place(target)], lambda: func(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))

    @staticmethod
    @torch.no_grad()
    def _unless_it_changes(name: str, parameter: Tensor, write: Callable[[], Any]) -> Any:
        data, before = parameter.data, parameter.detach().clone()
        result = write()
        if parameter.shape != before.shape or not torch.allclose(parameter, before, rtol=1e-4, equal_nan=True):
            parameter.data = data.copy_(before)
            raise UserError(
                f"the forward pass of the model writes to its parameter {name}, so that each pass changes the given "
                "model; let it compute with a copy, or run it once in eval mode if only the first pass writes"
            )
        return result

    @contextmanager
    def of_modules(self) -> Iterator[None]:
        """Watch calls of dense layers, and ``layer.weight`` and ``layer.bias``, inside the block."""
        with alone(), ExitStack() as stack:  # it changes classes of torch
            look_up = nn.Module.__getattr__

            def looked_up(module: nn.Module, attribute: str) -> Any:
                if attribute in ("weight", "bias"):
                    self._note({self.name_of[id(module)]} if id(module) in self.name_of else set())
                return look_up(module, attribute)

            stack.callback(setattr, nn.Module, "__getattr__", look_up)
            nn.Module.__getattr__ = looked_up  # type: ignore[method-assign]
            for kind in dense_kinds():
                stack.callback(setattr, kind, "forward", kind.forward)
                kind.forward = self._noting_calls(kind.forward)
            yield

    def _noting_calls(self, forward_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def called(module: Any, *given: Tensor, **named: Tensor) -> Tensor:
            name = self.name_of.get(id(module))
            if name and threading.get_ident() != self._thread:
                self.elsewhere.add(name)
            elif name:
                self._note_call(name, module, given, named)
            self.running.append(name)
            try:
                return forward_of(module, *given, **named)
            finally:
                self.running.pop()

        return called

    def _note_call(self, name: str, module: nn.Module, given: tuple, named: Mapping[str, Any]) -> None:
        self.called.add(name)
        if isinstance(module, nn.Embedding) and not self._are_given((*given, *named.values())):
            self.on_others.add(name)
        if isinstance(module, nn.Conv2d) and first_argument(given, named).ndim < 4:
            self.on_one.add(name)
        if torch._C._functorch.is_functorch_wrapped_tensor(first_argument(given, named)):
            self.transformed.add(name)

    def _are_given(self, values: tuple[Tensor, ...]) -> bool:
        return all(_address(value) in self.given for value in values)

    def _note(self, owners: set[str]) -> None:
        if self.running[-1] not in owners:
            self.read |= owners


def _place(tensor: Tensor) -> int:
    """Return the ``_address`` of a tensor of torch's own class; 0 for any other."""
    return _address(tensor) if type(tensor) in (Tensor, nn.Parameter) else 0


def _address(tensor: Tensor) -> int:
    """Return the address of the memory of ``tensor``; 0 where it has none of its own."""
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:  # as inside of torch.func, and of a sparse tensor
        return 0


def _writes(func: Any) -> bool:
    """Return whether ``func`` may write to its first argument. The rows that ``max_norm`` scales are restored."""
    name = getattr(func, "__name__", "")
    if name.endswith("__"):
        return name in ("__setitem__", "__set__") or name.startswith("__i")
    return name.endswith("_") and name != "embedding_renorm_"
