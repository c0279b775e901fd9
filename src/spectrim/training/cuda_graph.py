"""Record a training step as a CUDA graph, because a small network spends most of a step on launching kernels."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.batches import Inputs
from spectrim.errors import UserError

WARM = 3  # steps before the recording, in which libraries choose kernels and allocate memory


@dataclass(frozen=True)
class _Recording:
    """A recorded step.

    ``given``: the memory from which the kernels read inputs and targets.
    ``result``: the memory to which they write the result of the step.
    ``gradients``: the memory to which they write the gradient of each parameter; None where the step gives none.
    """

    graph: torch.cuda.CUDAGraph
    given: tuple[Tensor, Tensor]
    result: Any
    gradients: list[Tensor | None]

    def fill(self, inputs: Tensor, targets: Tensor) -> bool:
        """Copy a batch to where the next replay reads it. Return False if its shapes are not the recorded ones."""
        if inputs.shape != self.given[0].shape or targets.shape != self.given[1].shape:
            return False
        self.given[0].copy_(inputs)
        self.given[1].copy_(targets)
        return True


class Replayed:
    """Calls ``step(inputs, targets)``. On a GPU the step is recorded after a few calls and replayed from then on.

    The numbers are the same. Steps of different ``kind`` may alternate; each kind has its own recording. The next call
    overwrites the result of the one before.

    ``step``: a sequence of kernels that writes only to its result, to the gradients of ``parameters``, and in place to
    tensors that stay where they are. It runs without a recording on a CPU, for inputs that are not a single tensor, and
    for shapes that change. So it does where it reads the value of a tensor on the way.
    """

    def __init__(self, step: Callable[[Inputs, Any], Any], parameters: Iterable[nn.Parameter] = ()) -> None:
        self.step, self.parameters = step, list(parameters)
        self.recorded: dict[Hashable, _Recording] = {}
        self.ran: Counter[Hashable] = Counter()
        self.recordable = True

    def __call__(self, inputs: Inputs, targets: Any, kind: Hashable = None) -> Any:
        if self.recordable and kind not in self.recorded and self.ran[kind] >= WARM:
            self._record(inputs, targets, kind)
        self.ran[kind] += 1
        if kind not in self.recorded:
            return self.step(inputs, targets)
        recording = self.recorded[kind]
        if not recording.fill(inputs, targets):
            self._forget()
            return self.step(inputs, targets)
        for parameter, gradient in zip(self.parameters, recording.gradients, strict=True):
            parameter.grad = gradient
        recording.graph.replay()
        return recording.result

    def _record(self, inputs: Inputs, targets: Any, kind: Hashable) -> None:
        if not (isinstance(inputs, Tensor) and isinstance(targets, Tensor) and inputs.is_cuda):
            self.recordable = False
            return
        given, graph = (inputs.clone(), targets.clone()), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                result = self.step(*given)
        except (RuntimeError, UserError):  # The step read a value, but nothing is computed while recording.
            self._forget()
            torch.cuda.synchronize()
        else:
            gradients = [parameter.grad for parameter in self.parameters]
            self.recorded[kind] = _Recording(graph, given, result, gradients)

    def _forget(self) -> None:
        self.recordable = False
        self.recorded.clear()


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Run the block on a CUDA stream of its own, since the default one cannot be recorded. On a CPU do nothing."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield
    torch.cuda.synchronize(device)
