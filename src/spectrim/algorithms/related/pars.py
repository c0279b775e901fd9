"""Choose the ranks of all layers by Bayesian optimisation, scored after BatchNorm statistics are re-estimated (PARS).

PARS (Sobolev et al. 2022, Mathematics 10(20):3801): a cut shifts the features inside the network. The accuracy right
after it therefore predicts the accuracy after fine-tuning poorly. PARS re-estimates the BatchNorm statistics on
calibration data before it scores a candidate. Bayesian optimisation then finds the best ranks under a constraint on
cost.

What differs here:

- The statistics move by the difference of the dense and the cut model on the same samples (``batchnorm.reestimate``).
- Every vector meets the budget, by one common factor on its ratios.
- Any decomposer may be used.

The paper fine-tunes after the search. ``FineTuning`` does that here.
"""

from torch import nn

from spectrim.algorithms.related.bayesian_search import BayesianSearch, Ranks, Space, check_search
from spectrim.algorithms.related.judged import JudgedBy, error_or_loss
from spectrim.algorithms.shared.budget import Budgeted
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.measured import search_identity
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.spectrum import Decomposer
from spectrim.errors import UserError
from spectrim.statistics.batchnorm import SAMPLES, reestimate
from spectrim.statistics.objective import Objective
from spectrim.tools.settings import settings


@settings
class PARS(Budgeted):
    """Search for the most accurate ranks in a budget, with BatchNorm statistics re-estimated without labels.

    ``evaluations``: the number of vectors that are tried, each measured on the calibration split.
    ``batch_norm``: whether to re-estimate the statistics, in the search and in the returned model. False scores and
        returns the model as it is cut.
    ``samples``: the number of calibration samples for the statistics.
    ``judged_by``: ``accuracy``, or ``loss`` for a model without class scores.
    ``state``: the file from which an interrupted search is resumed. None: the search starts anew.
    """

    evaluations: int = 40
    batch_norm: bool = True
    samples: int = SAMPLES
    judged_by: JudgedBy = "accuracy"
    seed: int = 0
    state: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_search(self.evaluations)
        if self.samples < 1:
            raise UserError(f"samples must be at least 1, got {self.samples}")

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Search and cut. For each vector the log holds its step, its score and the part of the cost that it keeps.

        Raises ``UserError`` for a budget out of reach, without class scores, and for the state of another search.
        """
        bench = Workbench.of(model, decomposer, objective)
        space = Space(*self.budget(bench))
        dense = error_or_loss(model, objective, self.judged_by)
        identity = search_identity(self, bench)
        search = BayesianSearch(space, self.evaluations, self.seed, self.state, identity)
        ranks, log = search.minimise(lambda ranks: self.proxy(space, ranks) - dense, "pars")
        result = space.bench.finish(ranks, log)
        if self.batch_norm:
            reestimate(result.model, model, objective, self.samples)
        return result

    def proxy(self, space: Space, ranks: Ranks) -> float:
        """Return the calibration error or loss of a candidate, after its statistics are re-estimated."""
        cut, objective = space.bench.trial(ranks), space.bench.objective
        if self.batch_norm:
            reestimate(cut, space.bench.model, objective, self.samples)
        return error_or_loss(cut, objective, self.judged_by)
