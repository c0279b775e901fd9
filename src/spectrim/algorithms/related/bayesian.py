"""Bayesian optimisation of the ranks of all layers, by the accuracy of the cut model (Kim, Lee, Choe)."""

from torch import nn

from spectrim.algorithms.related.bayesian_search import BayesianSearch, Ranks, Space, check
from spectrim.algorithms.related.judged import JudgedBy, badness
from spectrim.algorithms.shared.budget import MaybeBudgeted, costs_of
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.measured import search_identity
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.spectrum import Decomposer
from spectrim.errors import UserError
from spectrim.statistics.objective import Objective
from spectrim.tools.settings import settings


@settings
class Bayesian(MaybeBudgeted):
    """The ranks of the least drop of accuracy within a budget, or of the least drop plus ``penalty`` times cost.

    Kim, Lee, Choe 2020 (IEEE Access 8:17605): a Gaussian process with expected improvement searches the ranks of all
    layers together, for a trade-off of accuracy and complexity or at a fixed compression. That is the paper's. Ours,
    who have only its abstract: the score is the drop of calibration accuracy right after the cut; ``penalty`` weighs
    the part of the parameters that is kept; every vector tried meets the budget, through one factor on its ratios; the
    first vector is the same ratio everywhere. The fine-tuning after the search is left out: that is ``FineTuning``.

    Exactly one of ``params_kept``, ``macs_kept`` (of the whole model, in (0, 1)) and ``penalty`` (at least 0).
    ``evaluations``: vectors tried. ``judged_by``: ``accuracy``, or the ``loss`` for what does not classify.
    ``state``: a file from which an interrupted search goes on; None: it begins anew.
    """

    params_kept: float | None = 0.5
    penalty: float | None = None
    evaluations: int = 40
    judged_by: JudgedBy = "accuracy"
    seed: int = 0
    state: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.evaluations)
        self.require_one("penalty")
        if self.penalty is not None and not self.penalty >= 0:
            raise UserError(f"penalty must be at least 0, got {self.penalty}")

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Search and cut. The log has, of each vector, its step, its score and the part of the cost it keeps.

        Raises ``UserError`` for a budget out of reach, without class scores, and for the state of another search.
        """
        bench = Workbench.of(model, decomposer, objective)
        bench, costs, share = self.budget(bench) if self.has_budget else (bench, costs_of(bench, "params"), None)
        space = Space(bench, costs, share)
        dense = badness(model, objective, self.judged_by)

        def score(ranks: Ranks) -> float:
            drop = badness(space.bench.cut(ranks), objective, self.judged_by) - dense
            return drop + (self.penalty or 0.0) * costs.share(ranks)

        identity = search_identity(self, bench, decomposer)
        search = BayesianSearch(space, self.evaluations, self.seed, self.state, identity)
        return bench.finish(*search.least(score, "bayesian"))
