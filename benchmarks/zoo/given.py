"""What a row of the zoo starts from: a model with random weights, two batches, and a loss."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SAMPLES = 4  # of each of the two batches
CLASSES = 10
WORDS = 120  # in the vocabulary


@dataclass(frozen=True)
class Given:
    """A model in eval mode, batches ``(inputs, targets)``, and their loss; None: the default one."""

    model: nn.Module
    batches: list[Any]
    loss: Callable[[Any, Any], Tensor] | None = None


@dataclass(frozen=True)
class Architecture:
    """One row. ``make`` builds it; the package need not be installed before that.

    ``onnx``: whether it is exported to ONNX, which takes longer than all else.
    """

    package: str
    name: str
    make: Callable[[], Given]
    onnx: bool = True


def images(model: nn.Module, size: int) -> Given:
    """Return a classifier of square images."""
    batches = [(torch.randn(SAMPLES, 3, size, size), torch.randint(0, CLASSES, (SAMPLES,))) for _ in range(2)]
    return Given(model.eval(), batches)


@dataclass(frozen=True)
class Scores:
    """Cross-entropy of the class scores that ``logits`` reads from the outputs."""

    logits: Callable[[Any], Tensor]

    def __call__(self, outputs: Any, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(outputs), targets)


def rises(outputs: Any, _: Any) -> Tensor:
    """Return a loss for a model without a task: the mean softplus of its largest output.

    A mean square would be constant after a LayerNorm.
    """
    return F.softplus(max(_tensors(outputs), key=Tensor.numel)).mean()


def _tensors(outputs: Any) -> list[Tensor]:
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    if isinstance(outputs, Tensor):
        return [outputs]
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
