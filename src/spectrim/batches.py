"""How a model is called on whatever a loader yields."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Any  # a tensor, a tuple of positional or a mapping of keyword arguments


def forward(model: nn.Module, inputs: Inputs) -> Any:
    """``model(inputs)``; a mapping is passed by keyword, a tuple or list by position."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """The same structure with every tensor on ``device``."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {key: to_device(value, device) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return type(inputs)(to_device(value, device) for value in inputs)
    return inputs


def first_sample(inputs: Inputs) -> Inputs:
    """The same structure with the first sample of every tensor, as a batch of one."""
    if isinstance(inputs, Tensor):
        return inputs[:1]
    if isinstance(inputs, Mapping):
        return {key: first_sample(value) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return type(inputs)(first_sample(value) for value in inputs)
    return inputs


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lies."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


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
