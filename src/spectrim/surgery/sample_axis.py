"""Count the samples of a batch by what the model says of its inputs: they may lie along the second dimension."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.batches import Inputs, batch_size, device_of, evaluating, first_argument, forward, tensors_of, to_device
from spectrim.errors import UserError
from spectrim.surgery.given_model import unchanged
from spectrim.tools.hooks import hooked


class Samples:
    """The number of samples of a batch, known when the model has run on it.

    A module of torch with ``batch_first=False``, as recurrent networks and attention are by default, holds the steps
    along the first dimension. Where it sees the leading dimensions of the inputs as they are, the inputs do so, too.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.count, self.steps_first = batch_size(inputs), False
        self.leading = next((tensor.shape[:2] for tensor in tensors_of(inputs) if tensor.ndim > 1), None)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator["Samples"]:
        """Learn from the calls of the modules of ``model`` inside the block."""
        told = [module for module in model.modules() if getattr(module, "batch_first", None) is False]
        with hooked(before=[(module, self._note) for module in told]):
            yield self

    def _note(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = first_argument(args, kwargs)
        if isinstance(x, Tensor) and x.ndim == 3 and x.shape[:2] == self.leading:
            self.count, self.steps_first = x.shape[1], True


def require_samples_first(model: nn.Module, example: Inputs, purpose: str) -> None:
    """Raise ``UserError`` where the first dimension of the inputs holds steps; ``purpose`` says what needs samples."""
    samples = Samples(example)
    with unchanged(model), evaluating(model), torch.no_grad(), samples.watching(model):
        forward(model, to_device(example, device_of(model)))
    if samples.steps_first:
        raise UserError(
            f"{purpose} takes samples along the first dimension of the inputs, and this model has batch_first=False; "
            "wrap it in a module that swaps the first two dimensions"
        )
