"""What a model costs: parameters, multiply-accumulates, milliseconds."""

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from spectrim.batches import Inputs, batch_size, device_of, evaluating, forward, to_device


class Cost(NamedTuple):
    """Of a whole model: parameters (shared ones once), and multiply-accumulates (MACs) of one input."""

    params: int
    macs: int


def model_cost(model: nn.Module, example: Inputs) -> Cost:
    """Count parameters and, by running ``example``, MACs of convolutions and matrix products."""
    # The counter reports floating point operations, two for each multiply-accumulate.
    macs = _counted(model, example).get_total_flops() // 2 // batch_size(example)
    return Cost(parameters(model), macs)


def parameters(model: nn.Module) -> int:
    """Numbers in the parameters of the whole model, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def layer_macs(model: nn.Module, layers: Sequence[str], example: Inputs) -> tuple[dict[str, float], float]:
    """MACs of one input in each of ``layers``, with all that is inside it, and in the whole model."""
    counter, twice = _counted(model, example), 2 * batch_size(example)
    root, counts = type(model).__name__, counter.get_flop_counts()
    # What multiplies nothing, as an embedding, is not counted.
    own = {name: counts.get(f"{root}.{name}", {}) for name in layers}
    return {name: sum(found.values()) / twice for name, found in own.items()}, counter.get_total_flops() / twice


def _counted(model: nn.Module, example: Inputs) -> FlopCounterMode:
    inputs = to_device(example, device_of(model))
    counter = FlopCounterMode(display=False)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not see into torch's fused transformer layer
    try:
        # Nor into every kernel of attention; by plain products the same number is reached.
        with evaluating(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            forward(model, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter


def latency(model: nn.Module, inputs: Inputs, seconds: float = 1.0) -> float:
    """Median milliseconds of one forward pass on ``inputs``, over at least five runs and about ``seconds``."""
    device = device_of(model)
    inputs = to_device(inputs, device)
    times: list[float] = []
    with evaluating(model), torch.inference_mode():
        forward(model, inputs)
        deadline = time.perf_counter() + seconds
        while len(times) < 5 or time.perf_counter() < deadline:
            started = time.perf_counter()
            forward(model, inputs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)
