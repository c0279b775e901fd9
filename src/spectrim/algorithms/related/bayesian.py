"""Choose the ranks of all layers by Bayesian optimisation of the accuracy after the cut.

Kim, Lee and Choe 2020 (IEEE Access 8:17605). A Gaussian process with expected improvement searches the ranks of all
layers together, for a trade-off of accuracy and complexity or at a fixed compression.

Only the abstract of the paper was at hand. The rest is chosen here:

- The score is the drop of calibration accuracy right after the cut, plus ``penalty`` times the part of the parameters
  that is kept.
- Every vector meets the budget, by one common factor on its ratios.
- The first vector has the same ratio in every layer.

The paper fine-tunes after the search. ``FineTuning`` does that here.
"""

from torch import nn

from spectrim.algorithms.related.bayesian_search import BayesianSearch, Ranks, Space, check_search
from spectrim.algorithms.related.judged import JudgedBy, error_or_loss
from spectrim.algorithms.shared.budget import MaybeBudgeted
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.measured import search_identity
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.spectrum import Decomposer
from spectrim.errors import UserError
from spectrim.statistics.objective import Objective
from spectrim.tools.settings import settings


@settings
class Bayesian(MaybeBudgeted):
    """Search for the ranks that lose least accuracy within a budget, or least accuracy plus a penalty on parameters.

    Set exactly one of the budgets of ``Budgeted`` and ``penalty``.

    ``penalty``: at least 0; the weight in the score of the parameters kept, as a part of the whole model's.
    ``evaluations``: the number of vectors that are tried, each measured on the calibration split.
    ``judged_by``: ``accuracy``, or ``loss`` for a model without class scores.
    ``state``: the file from which an interrupted search is resumed. None: the search starts anew.
    """

    params_kept: float | None = 0.5
    penalty: float | None = None
    evaluations: int = 40
    judged_by: JudgedBy = "accuracy"
    seed: int = 0
    state: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_search(self.evaluations)
        self.require_one("penalty")
        if self.penalty is not None and not self.penalty >= 0:
            raise UserError(f"penalty must be at least 0, got {self.penalty}")

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Search and cut. For each vector the log holds its step, its score and the part of the cost that it keeps.

        Raises ``UserError`` for a budget out of reach, without class scores, and for the state of another search.
        """
        bench, costs, requested = self.budget_or_params(Workbench.of(model, decomposer, objective))
        space = Space(bench, costs, requested)
        dense = error_or_loss(model, objective, self.judged_by)

        def score(ranks: Ranks) -> float:
            drop = error_or_loss(space.bench.trial(ranks), objective, self.judged_by) - dense
            return drop + (self.penalty or 0.0) * costs.achieved(ranks)

        identity = search_identity(self, bench)
        search = BayesianSearch(space, self.evaluations, self.seed, self.state, identity)
        return bench.finish(*search.minimise(score, "bayesian"))
