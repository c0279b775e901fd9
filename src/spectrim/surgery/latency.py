"""Measure the milliseconds of layers on this machine at a few ranks, and interpolate to every rank."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from spectrim.batches import Inputs, device_of, evaluating, forward, repeated, to_device
from spectrim.decomposers.spectrum import Spectrum
from spectrim.errors import UserError, first_line
from spectrim.surgery import replacing
from spectrim.surgery.given_model import unchanged
from spectrim.surgery.sample_axis import require_samples_first
from spectrim.surgery.tied import places
from spectrim.tools.hooks import hooked

Clock = Callable[[nn.Module, Inputs], float]  # milliseconds of one forward pass of the module on the inputs

RANKS = 5  # number of ranks at which a factored layer is measured
ROUNDS = 5  # the model and all layers take turns; the fastest round counts, because other load only adds time
TURNS = 15  # whole models take turns; the median counts, because one lucky pass could make any model the fastest
SECONDS = 0.02  # the least duration of one measurement
LEAST_SLOPE = 0.1  # the least slope of a curve, as a fraction of its mean slope


class LayerTimes(NamedTuple):
    """Hold the milliseconds of one layer in a pass: ``dense``, and ``factored`` at each of the rising ``ranks``."""

    dense: float
    ranks: tuple[int, ...]
    factored: tuple[float, ...]

    def curve(self, max_rank: int) -> Tensor:
        """Interpolate linearly to every rank, with 0 at rank 0 and a constant above the last measured rank.

        Returns a float64 tensor with ``max_rank + 1`` entries.
        """
        between = np.interp(range(1, max_rank + 1), self.ranks, rising(self.ranks, self.factored))
        return torch.tensor([0.0, *between], dtype=torch.float64)


class Times(NamedTuple):
    """Hold the times of the layers of a model by name, and the milliseconds of its forward pass ``outside`` of them."""

    layers: dict[str, LayerTimes]
    outside: float

    @property
    def total(self) -> float:
        """Return the milliseconds of the dense model."""
        return self.outside + sum(times.dense for times in self.layers.values())


def measured(
    model: nn.Module, spectra: Mapping[str, Spectrum], example: Inputs, batch_size: int, clock: Clock | None = None
) -> Times:
    """Time the layers of ``spectra``, dense and factored, on the inputs that each gets when ``model`` runs.

    Layers with the same class, settings, inputs and factors are measured once. Layers that share the weight of an
    embedding count with it. Layers may run faster inside of the model, with inputs still in the cache, than alone. If
    they add up to more than the model, ``outside`` is 0.

    ``example``: inputs, shortened or repeated to ``batch_size`` samples.
    ``clock``: ``milliseconds`` by default.

    Raises ``UserError`` where the first dimension of the inputs holds no samples, or where the model fails on so many.
    """
    clock = clock or milliseconds
    require_samples_first(model, example, "a budget in milliseconds")
    inputs = to_device(repeated(example, batch_size), device_of(model))
    _require_runs(model, inputs, batch_size)
    layers = {name: model.get_submodule(name) for name in spectra}
    every = {name: places(model, name, layer) for name, layer in layers.items()}
    given = _inputs_of(model, [place for own in every.values() for place in own], inputs)
    ranks = {name: ranks_to_measure(spectrum.break_even) for name, spectrum in spectra.items()}
    kinds = {
        name: _kind(layers[name], spectra[name], ranks[name], [call for place in every[name] for call in given[place]])
        for name in spectra
    }

    def factored(name: str, rank: int) -> dict[str, nn.Module]:
        made = places(model, name, spectra[name].factor(rank))
        return {place: replacing.in_place_of(every[name][place], own) for place, own in made.items()}

    forms = {
        name: [every[name], *(factored(name, rank) for rank in ranks[name])]
        for name in dict(zip(kinds.values(), kinds, strict=True)).values()  # one layer of each kind
    }
    whole, fastest = math.inf, {name: [math.inf] * len(own) for name, own in forms.items()}
    for _ in range(ROUNDS):
        whole = min(whole, clock(model, inputs))
        for name, own in forms.items():
            times = [sum(clock(one, call) for place, one in form.items() for call in given[place]) for form in own]
            fastest[name] = [min(pair) for pair in zip(fastest[name], times, strict=True)]
    of_kind = {kinds[name]: LayerTimes(times[0], ranks[name], tuple(times[1:])) for name, times in fastest.items()}
    found = {name: of_kind[kind] for name, kind in kinds.items()}
    return Times(found, max(0.0, whole - sum(times.dense for times in found.values())))


def in_turns(models: Sequence[nn.Module], example: Inputs, batch_size: int) -> list[float]:
    """Return the milliseconds of one forward pass of each model on ``batch_size`` samples: the median of ``TURNS``.

    The models take turns, so that other load on the machine affects all of them alike.
    """
    inputs = to_device(repeated(example, batch_size), device_of(models[0]))
    turns = [[milliseconds(one, inputs) for one in models] for _ in range(TURNS)]
    return [statistics.median(times) for times in zip(*turns, strict=True)]


def milliseconds(module: nn.Module, inputs: Inputs) -> float:
    """Return the median milliseconds of one forward pass in eval mode, with the current number of threads of torch."""
    # Imported here because it imports torch's compiler of extensions, which is slow and warns of a missing CUDA.
    from torch.utils.benchmark import Timer

    names = {"forward": forward, "module": module, "inputs": inputs}
    with evaluating(module), torch.inference_mode():
        timer = Timer("forward(module, inputs)", globals=names, num_threads=torch.get_num_threads())
        timer.timeit(1)  # the first call of a kernel is slow
        return 1000 * timer.blocked_autorange(min_run_time=SECONDS).median


def ranks_to_measure(most: int) -> tuple[int, ...]:
    """Return up to ``RANKS`` evenly spaced ranks from 1 to ``most``, each once."""
    return tuple(sorted({round(rank) for rank in np.linspace(1, most, RANKS)}))


def rising(ranks: Sequence[int], times: Sequence[float]) -> list[float]:
    """Return ``times`` with each one raised, where needed, above the one before.

    None is lowered, so that no rank is promised to be faster than measured. The rise is at least ``LEAST_SLOPE`` of the
    mean slope for each rank. So each removed component saves some time, and a search is not stuck on a plateau.
    """
    span = max(1, ranks[-1] - ranks[0])
    slope = max(LEAST_SLOPE * (times[-1] - times[0]), 1e-3 * times[0]) / span
    found = [times[0]]
    for before, rank, time in zip(ranks, ranks[1:], times[1:], strict=False):
        found.append(max(time, found[-1] + slope * (rank - before)))
    return found


def _require_runs(model: nn.Module, inputs: Inputs, batch_size: int) -> None:
    """Raise ``UserError`` where ``model`` cannot be timed on ``inputs``."""
    try:
        with unchanged(model), evaluating(model), torch.inference_mode():
            forward(model, inputs)
    except UserError as error:
        raise UserError(
            f"a budget in milliseconds runs the model in inference mode on {batch_size} samples, those of the first "
            f"calibration batch cut or repeated; there it fails: {first_line(error.__cause__ or error)}; give "
            "params_kept= or macs_kept= instead, or a batch_size= of the calibration batches"
        ) from error


def _inputs_of(model: nn.Module, names: Sequence[str], inputs: Inputs) -> dict[str, list[tuple]]:
    """Return the arguments of each layer, one tuple for each call."""
    given: dict[str, list[tuple]] = {name: [] for name in names}

    def note(name: str, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given[name].append((*args, *kwargs.values()))

    hooks = [(model.get_submodule(name), partial(note, name)) for name in names]
    with hooked(before=hooks), evaluating(model), torch.no_grad():
        forward(model, inputs)
    return given


def _kind(layer: nn.Module, spectrum: Spectrum, ranks: Sequence[int], given: Sequence[tuple]) -> Any:
    """Return everything that the times of a layer depend on."""
    factors = tuple((spectrum.sizes(rank), spectrum.kept(rank).form) for rank in ranks)
    inputs = tuple((x.shape, x.stride(), x.dtype) for call in given for x in call)
    weight: Any = layer.weight
    return repr(layer), factors, inputs, weight.stride(), weight.dtype
