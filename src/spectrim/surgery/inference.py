"""Put pivoted factors together once, for a model that only predicts."""

from typing import Any

import torch
from torch import nn

from spectrim.surgery.given_model import copied, eager
from spectrim.surgery.reopening import factored_layers, require_multipliable
from spectrim.surgery.replacing import by_id, copied_with, substitutes
from spectrim.surgery.tied import tied_layers


def for_inference(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` that predicts the same and does not put pivoted factors together in each pass.

    A pivoted layer becomes plain factors of the same rank, or dense where that has fewer numbers. So in memory the copy
    is at most as large as the dense model. It shares all other parameters with ``model``, which stays as it is: train
    and save that one, because its file is smaller. What is put together takes no gradient.

    Raises ``UserError`` for a model that cannot be copied, and where pivoted factors are quantised: quantise the copy.
    """
    model = eager(model)
    seconds, replaced, ties = dict[int, Any](), dict[str, nn.Module](), tied_layers(model)
    pivoted = {name: layer for name, layer in factored_layers(model).items() if layer.pivoted}
    require_multipliable(pivoted)
    for name, layer in pivoted.items():
        plain = layer.plain_pair()
        if not isinstance(plain, nn.Sequential):
            replaced[name] = plain.requires_grad_(False)
            continue
        seconds[id(layer.second)] = _placed(plain[1], layer)
        if name in ties:  # what shares the factors takes the new one from here
            replaced[name] = copied(layer, by_id(layer.parameters()) | seconds)
    others = substitutes(model, replaced)
    for second in seconds.values():
        second.requires_grad_(False)
    return copied_with(model, others, by_id(model.parameters()) | seconds)


def _placed(second: nn.Module, layer: Any) -> nn.Module:
    """Return the second factor in the mode and the memory format of its layer."""
    if isinstance(second, nn.Conv2d) and not layer.first.weight.is_contiguous():
        second.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return second.train(layer.training).requires_grad_(False)
