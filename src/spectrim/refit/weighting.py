"""Weigh the errors that a refit makes small by how much the loss feels them."""

from collections.abc import Iterable, Mapping
from typing import Literal

from torch import Tensor, nn

from spectrim.decomposers import oblique
from spectrim.decomposers.spectrum import Directions
from spectrim.errors import UserError
from spectrim.factored.dense import DenseLayer
from spectrim.statistics.objective import NoGradient, Objective
from spectrim.statistics.output_moments import output_moments
from spectrim.tools import resume
from spectrim.tools.content import of_state
from spectrim.tools.spill import SpilledTensors, SpillFolder

DAMPING = 0.1  # of the mean weight of an output; it is added to the weights of all

DIRECTIONS = Directions(labels=False, top=None, seed=0)
RefitBy = Literal["outputs", "loss"]
Weights = Mapping[str, Tensor | SpilledTensors]  # layer → G, float64 (g, O, O), or the file that holds it


def output_weights(
    by: RefitBy, dense: nn.Module, layers: Iterable[str], objective: Objective, samples: int
) -> Weights | None:
    """Return how much the loss feels an error of each layer's outputs: ``G = E[g g^T]`` for gradients g at them.

    An error e at one position raises the loss by ``e^T G e / 2`` to second order, with K-FAC's Fisher information
    (``output_moments``). The result is remembered for other budgets. An embedding has none. With ``layers_at_once`` of
    the objective the moments are on disk.

    ``by``: ``"outputs"`` gives None: all outputs of a layer count alike.
    ``samples``: number of samples to read, in whole batches.
    Raises ``UserError`` for an empty split, and for a loss or gradient that is not finite. Raises ``NoGradient`` where
    the loss feels an error of no layer.
    """
    if by == "outputs":
        return None
    modules = {name: dense.get_submodule(name) for name in layers}
    views = {
        name: (DenseLayer.of(module).view("channel"),)
        for name, module in modules.items()
        if not isinstance(module, nn.Embedding)
    }

    def measured() -> Weights:
        folder = None if objective.layers_at_once is None else SpillFolder()
        found, some = dict[str, Tensor | SpilledTensors](), False
        for block in objective.blocks(list(views)):
            for name, G_gOO in _moments(dense, {name: views[name] for name in block}, objective, samples).items():
                if not G_gOO.isfinite().all():
                    problem = "the gradients at its outputs hold NaN or infinity"
                    raise UserError(f'layer {name}: {problem}; check the data, or give refit_by="outputs"')
                some = some or bool(G_gOO.any())
                found[name] = G_gOO if folder is None else folder.write({"G": G_gOO})
        if found and not some:
            raise NoGradient
        return found

    key = (tuple(views), samples, of_state(dense))
    return objective.remembered(dense, "output weights", lambda: key, measured)


def _moments(
    dense: nn.Module, views: Mapping[str, tuple[str]], objective: Objective, samples: int
) -> Mapping[str, Tensor]:
    """Return G of some layers, each of which has one view. A killed process takes them up (``resume``)."""

    def made() -> resume.Result:
        found = output_moments(dense, views, objective, samples, DIRECTIONS)
        return resume.Result({name: own[views[name][0]] for name, own in found.items()})

    folder = resume.current()
    if folder is None:
        return made().tensors
    key = [*views, samples, repr(DIRECTIONS)]
    return objective.resumed(folder, "weights", dense, "calibration", made, key, samples).tensors


def weights_of(weights: Weights | None, layer: str) -> Tensor | None:
    """Return G of a layer; None where all its outputs count alike."""
    found = None if weights is None else weights.get(layer)
    return found.read()["G"] if isinstance(found, SpilledTensors) else found


def roots_of(G_gOO: Tensor) -> tuple[Tensor, Tensor]:
    """Return the root of the weights of each group and its inverse. ``DAMPING`` is added first."""
    return oblique.roots(G_gOO, DAMPING)


def mixed(mixing_gOO: Tensor, weight: Tensor) -> Tensor:
    """Return the ``weight`` of a last factor whose outputs are mixed within each group. Its shape stays (g O, …)."""
    return (mixing_gOO @ weight.reshape(*mixing_gOO.shape[:2], -1)).reshape(weight.shape)
