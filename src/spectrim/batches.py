"""Call a model on the batches of any loader, whatever the structure of its inputs."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from spectrim.errors import UserError, first_line

Inputs = Any  # a tensor, a tuple of positional or a mapping of keyword arguments
Batches = Iterable[tuple[Inputs, Any]]


def forward(model: nn.Module, inputs: Inputs) -> Any:
    """Return ``model(inputs)``; a mapping is passed by keyword, a tuple or list by position.

    Raises ``UserError`` where the model fails on the inputs; the message names the layer.
    """
    try:
        if isinstance(inputs, Mapping):
            return model(**inputs)
        if isinstance(inputs, tuple | list):
            return model(*inputs)
        return model(inputs)
    except UserError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        where = _failing_layer(model, error)
        raise UserError(
            f"the model failed on inputs of shape {_shapes(inputs)}{where and f', at layer {where}'}: "
            f"{first_line(error)}; give a model and inputs that fit each other"
        ) from error


def _failing_layer(model: nn.Module, error: Exception) -> str:
    """Return the name of the innermost module that was running; empty if that is the model itself."""
    names = {module: name for name, module in model.named_modules()}
    running = [frame.f_locals.get("self") for frame, _ in walk_tb(error.__traceback__)]
    return next((names[own] for own in reversed(running) if isinstance(own, nn.Module) and own in names), "")


def _shapes(inputs: Inputs) -> str:
    if isinstance(inputs, Mapping):
        return ", ".join(f"{key} {_shapes(value)}" for key, value in inputs.items())
    if isinstance(inputs, tuple | list):
        return ", ".join(_shapes(value) for value in inputs)
    return str(tuple(inputs.shape)) if isinstance(inputs, Tensor) else type(inputs).__name__


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """Move every tensor of ``inputs`` to ``device`` and keep the structure."""
    return _mapped(inputs, lambda tensor: tensor.to(device))


def first_sample(inputs: Inputs) -> Inputs:
    """Return ``inputs`` with the first sample of every tensor only, as a batch of one."""
    return first_samples(inputs, 1)


def first_samples(inputs: Inputs, count: int) -> Inputs:
    """Return ``inputs`` with at most the first ``count`` samples of every tensor."""
    return _mapped(inputs, lambda tensor: tensor[:count])


def one_sample(inputs: Inputs, index: int) -> Inputs:
    """Return ``inputs`` with only sample ``index`` of every tensor, as a batch of one."""
    return _mapped(inputs, lambda tensor: tensor[index : index + 1])


def repeated(inputs: Inputs, count: int) -> Inputs:
    """Return ``inputs`` with exactly ``count`` samples of every tensor, repeated cyclically if there are fewer."""
    return _mapped(inputs, lambda tensor: tensor[torch.arange(count, device=tensor.device) % len(tensor)])


def _mapped(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, Mapping):
        return {key: _mapped(value, change) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return type(inputs)(_mapped(value, change) for value in inputs)
    return inputs


@dataclass(frozen=True, eq=False)
class Pairs:
    """Batches of a split that can be iterated repeatedly; each iteration validates every batch."""

    split: str
    batches: Batches

    def __iter__(self) -> Iterator[tuple[Inputs, Any]]:
        return pairs(self.batches, self.split)


def pairs(batches: Batches, split: str) -> Iterator[tuple[Inputs, Any]]:
    """Yield the batches. Raises ``UserError`` for a batch that is not a pair ``(inputs, targets)``."""
    for batch in batches:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise UserError(
                f"a batch of the {split} set is a {type(batch).__name__}, not a pair: give (inputs, targets), "
                "several inputs as a tuple or a mapping of their own"
            )
        yield batch


def tensors_of(inputs: Inputs) -> list[Tensor]:
    """Return every tensor in ``inputs``."""
    found: list[Tensor] = []

    def noted(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _mapped(inputs, noted)
    return found


def sample_count(targets: Any) -> int:
    """Return the number of samples of a batch.

    ``targets``: a tensor, a mapping of tensors, or any object with a length.
    """
    if isinstance(targets, Tensor):
        return len(targets) if targets.ndim else 1
    if isinstance(targets, Mapping):
        return sample_count(next(iter(targets.values())))
    return len(targets)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter, or the CPU for a model without parameters."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove the hooks of ``handles`` when the block ends."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode inside the block, then restore the mode of every module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def alone_trainable(model: nn.Module, weights: Iterable[Tensor]) -> Iterator[None]:
    """Let only ``weights`` of the parameters of ``model`` require a gradient inside the block.

    A forward pass then does not store the activations that only the gradients of other parameters need.
    """
    wanted = {id(weight) for weight in weights}
    changed = [parameter for parameter in model.parameters() if parameter.requires_grad != (id(parameter) in wanted)]
    for parameter in changed:
        parameter.requires_grad_(not parameter.requires_grad)
    try:
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(not parameter.requires_grad)
