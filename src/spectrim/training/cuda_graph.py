"""A step of training recorded as a CUDA graph: a small net spends most of a step on launching its kernels."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.batches import Inputs
from spectrim.errors import UserError

WARM = 3  # steps before the recording, in which libraries choose their kernels and make room


@dataclass(frozen=True)
class _Recording:
    """``given``: where the kernels find inputs and targets; ``gradients``: where they leave those of the parameters,
    None for one that the step gives no gradient."""

    graph: torch.cuda.CUDAGraph
    given: tuple[Tensor, Tensor]
    result: Any
    gradients: list[Tensor | None]

    def fill(self, inputs: Tensor, targets: Tensor) -> bool:
        """Whether they have the recorded shapes; they then are what the next replay works on."""
        if inputs.shape != self.given[0].shape or targets.shape != self.given[1].shape:
            return False
        self.given[0].copy_(inputs)
        self.given[1].copy_(targets)
        return True


class Replayed:
    """``step(inputs, targets)``, on a GPU recorded once it has run a few times and replayed from then on.

    The step must be a pure sequence of kernels: what it computes in goes nowhere but into its result and the gradients
    of ``parameters``, and what it changes stays where it is. Steps of several ``kind``s may take turns: each has its
    recording. A result is overwritten by the next call. On the processor, where inputs are no single tensor, where
    shapes change, and where a step cannot be recorded since it looks at a value on the way, ``step`` is called as it
    is; the numbers are the same.
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
        except (RuntimeError, UserError):  # a value was asked for, and while recording nothing is computed
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
    """On a GPU a stream that can be recorded, as the default one cannot; what was asked for before is waited for."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield
    torch.cuda.synchronize(device)
