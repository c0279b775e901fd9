"""Decompose the layers of a model, in blocks of layers where memory is short, and remember their spectra."""

from collections.abc import Mapping

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
from spectrim.statistics.input_moments import input_moments
from spectrim.statistics.objective import Objective
from spectrim.statistics.output_moments import output_moments
from spectrim.statistics.packed import PackedMoments
from spectrim.tools import malloc
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
    """Return the moments of each layer that ``decomposer`` needs; none where the weight is enough."""
    views = {name: decomposer.views(layer) for name, layer in layers.items()}
    if not decomposer.samples or not any(views.values()):
        return {}
    directions, samples = directions_of(decomposer), decomposer.samples
    inputs = input_moments(model, views, objective, samples)
    if directions is not None:
        for name, own in output_moments(model, views, objective, samples, directions).items():
            inputs[name].parts.update({outputs_of(view): moment for view, moment in own.parts.items()})
    return inputs


def _spectrum(name: str, layer: nn.Module, decomposer: Decomposer, moments: Moments) -> Spectrum:
    try:
        return spectrum_of(layer, decomposer, moments)
    except UserError as error:
        raise UserError(f"layer {name}: {error}") from None
