"""Count the parameters and the multiply-accumulates of a model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from spectrim.batches import Inputs, device_of, evaluating, forward, to_device
from spectrim.surgery.given_model import unchanged
from spectrim.surgery.sample_axis import Samples
from spectrim.surgery.tied import tied_layers
from spectrim.surgery.unpacking import unpacked


class Cost(NamedTuple):
    """Hold the cost of a whole model: parameters, shared ones once, and multiply-accumulates (MACs) of one input."""

    params: int
    macs: int


def model_cost(model: nn.Module, example: Inputs) -> Cost:
    """Count parameters and, by running ``example``, MACs of convolutions and matrix products.

    Packed modules are counted ``unpacked``: the counter does not see into torch's kernels for LSTM and attention.
    """
    # The counter reports floating point operations, two for each multiply-accumulate.
    counter, samples = _counted(unpacked(model), example)
    return Cost(parameters(model), counter.get_total_flops() // 2 // samples)


def parameters(model: nn.Module) -> int:
    """Count the numbers in the parameters of the whole model, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def layer_parameters(model: nn.Module, name: str) -> int:
    """Count the numbers in the parameters of layer ``name``, dense or factored, without its bias."""
    layer = model.get_submodule(name)
    bias = getattr(layer, "bias", None)
    return parameters(layer) - (0 if bias is None else bias.numel())


def layer_macs(model: nn.Module, layers: Sequence[str], example: Inputs) -> tuple[dict[str, float], float]:
    """Count the MACs of one input in each of ``layers``, with their submodules, and in the whole model.

    Layers that share the weight of an embedding count with it.
    """
    (counter, samples), ties = _counted(model, example), tied_layers(model)
    root, counts, twice = type(model).__name__, counter.get_flop_counts(), 2 * samples

    def macs(name: str) -> float:
        # The counter has no entry for a layer without products, as an embedding.
        return sum(counts.get(f"{root}.{name}", {}).values()) / twice

    own = {name: sum(map(macs, (name, *ties.get(name, ())))) for name in layers}
    return own, counter.get_total_flops() / twice


def _counted(model: nn.Module, example: Inputs) -> tuple[FlopCounterMode, int]:
    """Return what is counted, and the number of samples of ``example``."""
    inputs = to_device(example, device_of(model))
    counter, samples = FlopCounterMode(display=False), Samples(example)
    counter.mod_tracker = _Running()
    # It does not see into every kernel of attention. Plain products reach the same number.
    with (
        unchanged(model),
        evaluating(model),
        torch.no_grad(),
        _without_fused_layers(),
        sdpa_kernel(SDPBackend.MATH),
        samples.watching(model),
        counter,
    ):
        forward(model, inputs)
    return counter, samples.count


class _Running(ModuleTracker):
    """The modules that are running forwards.

    That of torch also follows gradients back to the inputs of a module. It fails where the model takes them itself, and
    where an input has none, as a view of a parameter under no_grad.
    """

    def _fw_pre_hook(self, mod: nn.Module, input: Any) -> None:
        self._get_append_fn(self._get_mod_name(mod), False)()

    def _fw_post_hook(self, mod: nn.Module, input: Any, output: Any) -> None:
        self._get_pop_fn(self._get_mod_name(mod), False)()


@contextmanager
def _without_fused_layers() -> Iterator[None]:
    """Let torch compute its transformer layer by single operations, into which a counter sees."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
