"""Compress by any algorithm, then train the compressed model."""

from dataclasses import replace

from torch import nn

from spectrim.algorithms.shared.compressed import Algorithm, Compressed, decomposer_of
from spectrim.algorithms.shared.trained import in_modes_of, state_file, train
from spectrim.decomposers.spectrum import Decomposer
from spectrim.statistics.objective import Objective
from spectrim.surgery.given_model import copied
from spectrim.tools.settings import settings
from spectrim.training.fit import Training
from spectrim.training.recipe import Recipe


@settings
class FineTuning:
    """Compress by ``selector``, then train the compressed model by ``recipe``. No layer changes its rank or its form.

    ``seed``: seed of the training.
    ``state``: the file from which an interrupted training goes on; None keeps nothing.
    """

    selector: Algorithm
    recipe: Recipe
    seed: int = 0
    state: str | None = None

    @property
    def decomposer(self) -> Decomposer:
        """Return the decomposer that the algorithm is best with."""
        return decomposer_of(self.selector)

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Compress and train. The log has the algorithm's steps, then one entry an epoch.

        Raises ``UserError`` without a ``train`` split and where the loss stops being finite.
        """
        objective.given("train")  # refused before the selection, not after it
        compressed = self.selector.compress(model, decomposer, objective)
        net = copied(compressed.model)
        training = Training(self.recipe, self.seed, objective.loss)
        curve = train(net, objective, training, state=state_file(self.state, objective))
        in_modes_of(compressed.model, net)
        return replace(compressed, model=net, log=[*compressed.log, *curve], trained=True)
