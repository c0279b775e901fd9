"""Decompose the layers of a model, in blocks of layers where memory is short, and remember their spectra."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from spectrim.algorithms.shared.outline import warn_if_short
from spectrim.decomposers.spectrum import (
    NO_MOMENTS,
    Decomposer,
    Moments,
    Spectrum,
    directions_of,
    outputs_of,
    spectrum_of,
)
from spectrim.errors import UserError
from spectrim.statistics import packed
from spectrim.statistics.input_moments import input_moments
from spectrim.statistics.objective import Objective
from spectrim.statistics.output_moments import output_moments
from spectrim.statistics.packed import PackedMoments
from spectrim.tools import malloc, resume
from spectrim.tools.content import of_state
from spectrim.tools.live import Bar
from spectrim.tools.spill import SpillFolder


def decomposed(
    model: nn.Module, decomposer: Decomposer, objective: Objective, layers: Mapping[str, nn.Module]
) -> dict[str, Spectrum]:
    """Return the spectrum of every layer.

    Plain spectra are cached for each layer. Whitened ones are cached all together in the memory of ``objective``,
    because their moments take a pass through the model.
    """
    if not decomposer.samples:
        return _spectra(model, decomposer, objective, layers)
    return objective.remembered(
        model,
        "whitened",
        lambda: (decomposer, tuple(layers), of_state(model)),
        lambda: _spectra(model, decomposer, objective, layers),
    )


def _spectra(
    model: nn.Module, decomposer: Decomposer, objective: Objective, layers: Mapping[str, nn.Module]
) -> dict[str, Spectrum]:
    """Decompose the layers in the blocks of ``objective``. With ``layers_at_once`` the factors are kept on disk."""
    warn_if_short(model, layers, decomposer, objective.layers_at_once)
    folder = None if objective.layers_at_once is None else SpillFolder()
    found: dict[str, Spectrum] = {}
    with Bar(desc="decompose", total=len(layers), unit="layer", leave=False) as bar:
        for block in objective.blocks(list(layers)):
            moments = moments_for(decomposer, model, {name: layers[name] for name in block}, objective)
            malloc.give_back()  # what the passes through the model have left
            for name in block:
                own = moments.pop(name, NO_MOMENTS)  # not needed any more: all moments weigh more than all factors
                found[name] = _spectrum(name, layers[name], decomposer, own)
                if folder:
                    found[name].spill(folder)
                bar.update()
            malloc.give_back()
    return found


def moments_for(
    decomposer: Decomposer, model: nn.Module, layers: Mapping[str, nn.Module], objective: Objective
) -> dict[str, PackedMoments]:
    """Return the moments of each layer that ``decomposer`` needs; none where the weight is enough.

    A killed process takes them up (``resume``).
    """
    views = {name: decomposer.views(layer) for name, layer in layers.items()}
    if not decomposer.samples or not any(views.values()):
        return {}
    samples, directions = decomposer.samples, directions_of(decomposer)
    given = model, views, objective, samples
    key: list[Any] = [*views.items(), samples]
    found = _resumed("inputs", partial(input_moments, *given), model, objective, samples, key)
    if directions is not None:
        key.append(repr(directions))
        outputs = _resumed("outputs", partial(output_moments, *given, directions), model, objective, samples, key)
        for name, own in outputs.items():
            found[name].parts.update({outputs_of(view): moment for view, moment in own.parts.items()})
    return found


def _resumed(
    kind: str,
    make: Callable[[], Mapping[str, PackedMoments]],
    model: nn.Module,
    objective: Objective,
    samples: int,
    key: Sequence[Any],
) -> dict[str, PackedMoments]:
    """Return what ``make`` computes on so many calibration samples, or what the folder of ``resume`` keeps of it."""
    folder = resume.current()
    if folder is None:
        return dict(make())
    found = objective.resumed(folder, kind, model, "calibration", lambda: packed.as_result(make()), key, samples)
    return packed.of_result(found)


def _spectrum(name: str, layer: nn.Module, decomposer: Decomposer, moments: Moments) -> Spectrum:
    try:
        return spectrum_of(layer, decomposer, moments)
    except UserError as error:
        raise UserError(f"layer {name}: {error}") from None
