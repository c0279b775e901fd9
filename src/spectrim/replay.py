"""A step of training recorded as a CUDA graph: a small net spends most of a step on launching its kernels."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from spectrim.batches import Inputs
from spectrim.errors import UserError

WARM = 3  # steps before the recording, in which libraries choose their kernels and make room


class Replayed:
    """``step(inputs, targets)``, on a GPU recorded once it has run a few times and replayed from then on.

    The step must be a pure sequence of kernels: what it computes in goes nowhere but into its result, and what it
    changes stays where it is. A result is overwritten by the next call. On the processor, where inputs are no single
    tensor, where shapes change, and where a step cannot be recorded since it looks at a value on the way, ``step`` is
    called as it is; the numbers are the same.
    """

    def __init__(self, step: Callable[[Inputs, Any], Any]) -> None:
        self.step, self.warm = step, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.given: tuple[Tensor, Tensor] | None = None
        self.result: Any = None
        self.recordable = True

    def __call__(self, inputs: Inputs, targets: Any) -> Any:
        if self.graph is None and self.recordable and self.warm >= WARM:
            self._record(inputs, targets)
        self.warm += 1
        if self.graph is None or not self._fill(inputs, targets):
            self.graph = None
            return self.step(inputs, targets)
        self.graph.replay()
        return self.result

    def _record(self, inputs: Inputs, targets: Any) -> None:
        self.recordable = isinstance(inputs, Tensor) and isinstance(targets, Tensor) and inputs.is_cuda
        if not self.recordable:
            return
        self.given, graph = (inputs.clone(), targets.clone()), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                self.result = self.step(*self.given)
            self.graph = graph
        except (RuntimeError, UserError):  # a value was asked for, and while recording nothing is computed
            self.recordable = False
            torch.cuda.synchronize()

    def _fill(self, inputs: Inputs, targets: Any) -> bool:
        """Whether they have the recorded shapes; they then are what the next replay works on."""
        assert self.given is not None
        self.recordable = all(
            one.shape == other.shape for one, other in zip(self.given, (inputs, targets), strict=True)
        )
        if self.recordable:
            self.given[0].copy_(inputs)
            self.given[1].copy_(targets)
        return self.recordable


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
