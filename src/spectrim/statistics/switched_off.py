"""Tell which layers a model calls with gradients switched off, so that none reaches them."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from spectrim.batches import Inputs, device_of, evaluating, forward, to_device
from spectrim.surgery.given_model import unchanged
from spectrim.tools.hooks import hooked
from spectrim.tools.trainable import alone_trainable

SWITCHED_OFF = (
    "the model calls it with gradients switched off, as inside of torch.no_grad; let it switch them off outside of "
    "forward, or take an algorithm that needs none, such as knapsack"
)


class SwitchedOff:
    """The layers that are called with gradients switched off, and at no call with gradients."""

    def __init__(self) -> None:
        self._on, self._off = set[str](), set[str]()

    def noting(self, name: str) -> Callable[..., None]:
        """Return a hook that notes a call of layer ``name``."""

        def hook(_: nn.Module, *__: Any) -> None:
            (self._on if torch.is_grad_enabled() else self._off).add(name)

        return hook

    @property
    def layers(self) -> set[str]:
        """Return the names of the layers."""
        return self._off - self._on


def switched_off(model: nn.Module, layers: Collection[str], example: Inputs) -> set[str]:
    """Return those of ``layers`` that are ``SwitchedOff`` in a pass over ``example``; none are asked for: no pass."""
    off = SwitchedOff()
    if layers:
        hooks = [(model.get_submodule(name), off.noting(name)) for name in layers]
        with unchanged(model), hooked(after=hooks), evaluating(model), torch.enable_grad(), alone_trainable(model, ()):
            forward(model, to_device(example, device_of(model)))
    return off.layers
