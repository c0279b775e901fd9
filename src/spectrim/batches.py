"""How a model is called on whatever a loader yields."""

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
    """``model(inputs)``; a mapping is passed by keyword, a tuple or list by position.

    Raises ``UserError``, which names the layer, where the model fails on them.
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
    """Name of the innermost module that was running; empty where that is the model itself."""
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
    """The same structure with every tensor on ``device``."""
    return _mapped(inputs, lambda tensor: tensor.to(device))


def first_sample(inputs: Inputs) -> Inputs:
    """The same structure with the first sample of every tensor, as a batch of one."""
    return first_samples(inputs, 1)


def first_samples(inputs: Inputs, count: int) -> Inputs:
    """The same structure with the first ``count`` samples of every tensor, all of them where there are fewer."""
    return _mapped(inputs, lambda tensor: tensor[:count])


def one_sample(inputs: Inputs, index: int) -> Inputs:
    """The same structure with one sample of every tensor, as a batch of one."""
    return _mapped(inputs, lambda tensor: tensor[index : index + 1])


def repeated(inputs: Inputs, count: int) -> Inputs:
    """The same structure with ``count`` samples of every tensor: again and again where there are fewer."""
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
    """The batches of a split, again and again, each of them looked at."""

    split: str
    batches: Batches

    def __iter__(self) -> Iterator[tuple[Inputs, Any]]:
        return pairs(self.batches, self.split)


def pairs(batches: Batches, split: str) -> Iterator[tuple[Inputs, Any]]:
    """The batches, each of them looked at. Raises ``UserError`` for one that is no pair."""
    for batch in batches:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise UserError(
                f"a batch of the {split} set is a {type(batch).__name__}, not a pair: give (inputs, targets), "
                "several inputs as a tuple or a mapping of their own"
            )
        yield batch


def tensors_of(inputs: Inputs) -> list[Tensor]:
    """Every tensor in it."""
    found: list[Tensor] = []

    def noted(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _mapped(inputs, noted)
    return found


def sample_count(targets: Any) -> int:
    """Number of samples of a batch, told by its targets: a tensor, a mapping of tensors, or anything with a length."""
    if isinstance(targets, Tensor):
        return len(targets) if targets.ndim else 1
    if isinstance(targets, Mapping):
        return sample_count(next(iter(targets.values())))
    return len(targets)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lies."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """The hooks of ``handles`` for the block; afterwards they are gone."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode inside the block; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def alone_trainable(model: nn.Module, weights: Iterable[Tensor]) -> Iterator[None]:
    """Let ``weights`` and no other parameter of ``model`` require a gradient inside the block.

    What a backward pass to the others would need is then not kept of a forward pass.
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
