"""Tell which layers a model calls with gradients switched off, so that none reaches them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

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
