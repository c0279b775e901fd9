"""Adapt the BatchNorm statistics of a compressed model, without labels."""

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from spectrim.batches import Inputs, device_of, evaluating, first_argument, forward, tensors_of, to_device
from spectrim.errors import UserError
from spectrim.statistics.objective import Objective
from spectrim.statistics.processes import Processes
from spectrim.surgery.given_model import unchanged
from spectrim.tools.content import content, of_state
from spectrim.tools.hooks import hooked
from spectrim.tools.precision import wide

# After compression the statistics either stay those of the dense model or follow the change.
BatchNorm = Literal["keep", "follow"]
SAMPLES = 2000  # calibration samples from which they follow

Statistics = tuple[Tensor, Tensor]  # mean and variance of each channel
EPSILON = 1e-6  # added to a variance, because that of a dead channel is zero


def reestimate(compressed: nn.Module, dense: nn.Module, objective: Objective, samples: int) -> None:
    """Shift the statistics of every BatchNorm of ``compressed``, in place, by the effect of compression.

    Both models see the same samples. The running statistics move as the statistics of the batch differ between the two
    models. Effects that both models share cancel: the noise of a small sample, and the missing augmentation. A model
    that was not compressed therefore keeps its statistics exactly. Each layer is corrected before the next one is
    measured. ``dense`` is not changed.

    ``samples``: number of calibration samples to read.
    Raises ``UserError`` for an empty calibration split.
    """
    mine, theirs = norms_of(compressed), norms_of(dense)
    shared = {name: norm for name, norm in mine.items() if name in theirs}
    if not shared:
        return
    # A search compresses one model many times.
    known: dict[str, dict[str, list[Statistics]]] = objective.remembered(dense, "norms", lambda: of_state(dense), dict)
    corrections = {name: _Correction(theirs[name]) for name in shared}
    hooks = [(norm, corrections[name]) for name, norm in shared.items()]
    device, passed = device_of(compressed), dict[str, dict[str, list[Statistics]]]()
    with unchanged(compressed, fitted=True), hooked(before=hooks), evaluating(compressed), torch.no_grad():
        for inputs, _ in objective.first("calibration", samples, "batch norm"):
            batch = content(tensors_of(inputs))  # A loader that shuffles gives other batches each time.
            inputs = to_device(inputs, device)
            passed[batch] = known[batch] if batch in known else _seen(dense, inputs)
            for name in shared:
                corrections[name].seen_by_dense = iter(passed[batch].get(name, ()))
            forward(compressed, inputs)
    known.clear()
    known.update(passed)
    for name, norm in shared.items():
        corrections[name].settle(norm, objective.processes("calibration"))


def require(choice: str) -> None:
    """Raise ``UserError`` where ``choice`` is not a value of ``BatchNorm``."""
    if choice not in get_args(BatchNorm):
        raise UserError(f"batch_norm is one of {', '.join(get_args(BatchNorm))}, not {choice!r}")


def norms_of(model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """Return the BatchNorm layers with running statistics, by name."""
    kind = nn.modules.batchnorm._BatchNorm
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kind) and module.running_mean is not None and module.running_var is not None
    }


def _seen(dense: nn.Module, inputs: Inputs) -> dict[str, list[Statistics]]:
    """Return the statistics of the inputs of each BatchNorm of ``dense``, by name, one entry a call."""
    found: dict[str, list[Statistics]] = {}

    def watch(name: str, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.setdefault(name, []).append(_statistics(first_argument(args, kwargs)))

    hooks = [(norm, partial(watch, name)) for name, norm in norms_of(dense).items()]
    with hooked(before=hooks), evaluating(dense):
        forward(dense, inputs)
    return found


def _statistics(x: Tensor) -> Statistics:
    """Return mean and variance of each channel, both of shape (C,), for inputs of shape (N, C, ...)."""
    channels = wide(x.detach()).transpose(0, 1).flatten(1)
    return channels.mean(1), channels.var(1, unbiased=False)


class _Correction:
    """A hook that corrects one BatchNorm for the current batch, and averages the corrections over all calls."""

    seen_by_dense: Iterator[Statistics]  # in the current batch, one entry a call

    def __init__(self, dense: nn.modules.batchnorm._BatchNorm) -> None:
        assert dense.running_mean is not None and dense.running_var is not None
        self.mean, self.var = wide(dense.running_mean).clone(), wide(dense.running_var).clone()
        self.mean_sum, self.var_sum, self.calls = torch.zeros_like(self.mean), torch.zeros_like(self.var), 0

    def __call__(self, norm: nn.modules.batchnorm._BatchNorm, args: tuple, kwargs: dict[str, Any]) -> None:
        dense = next(self.seen_by_dense, None)
        if dense is None:  # the dense model does not come here
            return
        (mean, var), (dense_mean, dense_var) = _statistics(first_argument(args, kwargs)), dense
        ratio = (var + EPSILON) / (dense_var + EPSILON)
        corrected = mean + (self.mean - dense_mean) * ratio.sqrt(), self.var * ratio
        self._set(norm, *corrected)
        self.mean_sum += corrected[0]
        self.var_sum += corrected[1]
        self.calls += 1

    def settle(self, norm: nn.modules.batchnorm._BatchNorm, processes: Processes) -> None:
        """Set the mean of the corrections of all processes."""
        calls = int(processes.add_up(torch.tensor(self.calls)))
        if calls:
            self._set(norm, processes.add_up(self.mean_sum) / calls, processes.add_up(self.var_sum) / calls)

    @staticmethod
    def _set(norm: nn.modules.batchnorm._BatchNorm, mean: Tensor, var: Tensor) -> None:
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
