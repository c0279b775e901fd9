"""What layers take here: milliseconds measured at a few ranks, and the curve over every rank through them."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from spectrim.batches import Inputs, device_of, evaluating, forward, hooked, repeated, to_device
from spectrim.decomposers.spectrum import Spectrum
from spectrim.surgery import replacing

Clock = Callable[[nn.Module, Inputs], float]  # milliseconds of one forward pass of the module on the inputs

RANKS = 5  # at which the factors of a layer are measured
ROUNDS = 5  # in which the model and all layers take turns: the fastest counts, for what else a machine does only adds
TURNS = 15  # of whole models that are compared: the median counts, for one lucky pass makes a model the fastest
SECONDS = 0.02  # of one measurement, at least
LEAST_SLOPE = 0.1  # of a curve anywhere, as a part of its mean slope


class LayerTimes(NamedTuple):
    """Milliseconds of one layer in one forward pass: ``dense``, and ``factored`` at each of ``ranks``, rising."""

    dense: float
    ranks: tuple[int, ...]
    factored: tuple[float, ...]

    def curve(self, max_rank: int) -> Tensor:
        """At every rank, 0 without any: linear between the measured ones, level above the last. float64, rising."""
        between = np.interp(range(1, max_rank + 1), self.ranks, rising(self.ranks, self.factored))
        return torch.tensor([0.0, *between], dtype=torch.float64)


class Times(NamedTuple):
    """Of a model's layers, by name, and ``outside``: of all that its forward pass does beside them."""

    layers: dict[str, LayerTimes]
    outside: float

    @property
    def total(self) -> float:
        """Milliseconds of the dense model."""
        return self.outside + sum(times.dense for times in self.layers.values())


def measured(
    model: nn.Module, spectra: Mapping[str, Spectrum], example: Inputs, batch_size: int, clock: Clock | None = None
) -> Times:
    """Time the layers of ``spectra``, each on what it is given when ``model`` sees ``batch_size`` samples.

    ``example`` is cut to that size, or repeated. Layers that are alike, in what they are, what they are given and how
    they are factored, are measured once. ``clock``: ``milliseconds``, where none is given. The layers of a model may
    run faster inside of it, on inputs still in the cache, than by themselves: where they add up to more than the whole,
    nothing counts as outside of them.
    """
    clock = clock or milliseconds
    inputs = to_device(repeated(example, batch_size), device_of(model))
    given = _inputs_of(model, list(spectra), inputs)
    layers = {name: model.get_submodule(name) for name in spectra}
    ranks = {name: ranks_to_measure(spectrum.break_even) for name, spectrum in spectra.items()}
    kinds = {name: _kind(layers[name], spectra[name], ranks[name], given[name]) for name in spectra}
    forms = {
        name: [layers[name], *(replacing.in_place_of(layers[name], spectra[name].factor(rank)) for rank in ranks[name])]
        for name in dict(zip(kinds.values(), kinds, strict=True)).values()  # one layer of each kind
    }
    whole, fastest = math.inf, {name: [math.inf] * len(own) for name, own in forms.items()}
    for _ in range(ROUNDS):
        whole = min(whole, clock(model, inputs))
        for name, own in forms.items():
            times = [sum(clock(form, call) for call in given[name]) for form in own]
            fastest[name] = [min(pair) for pair in zip(fastest[name], times, strict=True)]
    of_kind = {kinds[name]: LayerTimes(times[0], ranks[name], tuple(times[1:])) for name, times in fastest.items()}
    found = {name: of_kind[kind] for name, kind in kinds.items()}
    return Times(found, max(0.0, whole - sum(times.dense for times in found.values())))


def in_turns(models: Sequence[nn.Module], example: Inputs, batch_size: int) -> list[float]:
    """Milliseconds of one forward pass of each model on ``batch_size`` samples, the median over ``TURNS`` of them.

    In turns, so that whatever else the machine does meets all of them alike.
    """
    inputs = to_device(repeated(example, batch_size), device_of(models[0]))
    turns = [[milliseconds(one, inputs) for one in models] for _ in range(TURNS)]
    return [statistics.median(times) for times in zip(*turns, strict=True)]


def milliseconds(module: nn.Module, inputs: Inputs) -> float:
    """Median of one forward pass in eval mode, with as many threads as torch uses now."""
    # Here, not above: it imports torch's compiler of extensions, which takes its time and warns of a missing CUDA.
    from torch.utils.benchmark import Timer

    names = {"forward": forward, "module": module, "inputs": inputs}
    with evaluating(module), torch.inference_mode():
        timer = Timer("forward(module, inputs)", globals=names, num_threads=torch.get_num_threads())
        timer.timeit(1)  # the first call of a kernel is slow
        return 1000 * timer.blocked_autorange(min_run_time=SECONDS).median


def ranks_to_measure(most: int) -> tuple[int, ...]:
    """``RANKS`` of them from 1 to ``most``, evenly; each once."""
    return tuple(sorted({round(rank) for rank in np.linspace(1, most, RANKS)}))


def rising(ranks: Sequence[int], times: Sequence[float]) -> list[float]:
    """``times`` with each of them raised to where it lies above the one before.

    Raised, never lowered: no rank is promised to be faster than it was measured. By at least ``LEAST_SLOPE`` of the
    mean slope a rank: what is removed from a layer always saves something, so that one on a plateau is not stuck there.
    """
    span = max(1, ranks[-1] - ranks[0])
    slope = max(LEAST_SLOPE * (times[-1] - times[0]), 1e-3 * times[0]) / span
    found = [times[0]]
    for before, rank, time in zip(ranks, ranks[1:], times[1:], strict=False):
        found.append(max(time, found[-1] + slope * (rank - before)))
    return found


def _inputs_of(model: nn.Module, names: Sequence[str], inputs: Inputs) -> dict[str, list[tuple]]:
    """What each layer is called with, once a call."""
    given: dict[str, list[tuple]] = {name: [] for name in names}

    def note(name: str, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given[name].append((*args, *kwargs.values()))

    handles = [
        model.get_submodule(name).register_forward_pre_hook(partial(note, name), with_kwargs=True) for name in names
    ]
    with hooked(handles), evaluating(model), torch.inference_mode():
        forward(model, inputs)
    return given


def _kind(layer: nn.Module, spectrum: Spectrum, ranks: Sequence[int], given: Sequence[tuple]) -> Any:
    """What the times of a layer depend on."""
    factors = tuple((spectrum.sizes(rank), spectrum.kept(rank).form) for rank in ranks)
    inputs = tuple((x.shape, x.stride(), x.dtype) for call in given for x in call)
    weight: Any = layer.weight
    return repr(layer), factors, inputs, weight.stride(), weight.dtype
