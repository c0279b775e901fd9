"""Weigh the errors that a refit makes small by how much the loss feels them."""

from collections.abc import Iterable, Mapping
from typing import Literal

from torch import Tensor, nn

from spectrim.decomposers import oblique
from spectrim.decomposers.spectrum import Directions, content
from spectrim.errors import UserError
from spectrim.factored.dense import DenseLayer
from spectrim.statistics.objective import Objective
from spectrim.statistics.output_moments import output_moments

DAMPING = 0.1  # of the mean weight of an output; it is added to the weights of all

RefitBy = Literal["outputs", "loss"]
Weights = Mapping[str, Tensor]  # layer → G, float64 (g, O, O)


def output_weights(
    by: RefitBy, dense: nn.Module, layers: Iterable[str], objective: Objective, samples: int
) -> Weights | None:
    """Return how much the loss feels an error of each layer's outputs: ``G = E[g g^T]`` for gradients g at them.

    An error e at one position raises the loss by ``e^T G e / 2`` to second order, with K-FAC's Fisher information
    (``output_moments``). The result is remembered for other budgets. An embedding has none.

    ``by``: ``"outputs"`` gives None: all outputs of a layer count alike.
    ``samples``: number of samples to read, in whole batches.
    Raises ``UserError`` for an empty split, and for a loss or gradient that is not finite.
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
        found = output_moments(dense, views, objective, samples, Directions(False, None, 0))
        for name, own in found.items():
            if not next(iter(own.values())).isfinite().all():
                raise UserError(f"layer {name}: the gradients at its outputs hold NaN or infinity; check the weights")
        return {name: next(iter(own.values())) for name, own in found.items()}

    key = (tuple(views), samples, content(dense.state_dict().values()))
    return objective.remembered(dense, "output weights", lambda: key, measured)


def roots_of(G_gOO: Tensor) -> tuple[Tensor, Tensor]:
    """Return the root of the weights of each group and its inverse. ``DAMPING`` is added first."""
    return oblique.roots(G_gOO, DAMPING)


def mixed(mixing_gOO: Tensor, weight: Tensor) -> Tensor:
    """Return the ``weight`` of a last factor whose outputs are mixed within each group. Its shape stays (g O, …)."""
    return (mixing_gOO @ weight.reshape(*mixing_gOO.shape[:2], -1)).reshape(weight.shape)
