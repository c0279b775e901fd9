"""Bayesian optimisation of the ranks of all layers, by a proxy that repairs BatchNorm first (PARS)."""

from torch import nn

from spectrim.algorithms.related.bayesian_search import BayesianSearch, Ranks, Space, check
from spectrim.algorithms.related.judged import JudgedBy, badness
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
    """The ranks, within a budget, of the best accuracy after BatchNorm statistics are re-estimated without labels.

    PARS (Sobolev et al. 2022, Mathematics 10(20):3801): a cut shifts the features inside the network, so that accuracy
    right after it foretells little of accuracy after fine-tuning; the statistics of BatchNorm are re-estimated on
    calibration data before a candidate is scored, and Bayesian optimisation looks for the best ranks under a constraint
    on the cost. That is the paper's. Ours: the statistics move by what differs between the dense and the cut model on
    the same samples (``batchnorm.reestimate``); every vector tried meets the budget, through one factor on its ratios;
    any decomposer may be given. The fine-tuning after the search is left out: that is ``FineTuning``.

    ``evaluations``: vectors tried. ``batch_norm``: whether statistics are re-estimated, in the search and in what is
    returned; false scores the model as it is cut. ``samples``: calibration samples they are re-estimated on.
    ``judged_by``: ``accuracy``, or the ``loss`` for what does not classify.
    ``state``: a file from which an interrupted search goes on; None: it begins anew.
    """

    evaluations: int = 40
    batch_norm: bool = True
    samples: int = SAMPLES
    judged_by: JudgedBy = "accuracy"
    seed: int = 0
    state: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.evaluations)
        if self.samples < 1:
            raise UserError(f"samples must be at least 1, got {self.samples}")

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Search and cut. The log has, of each vector, its step, its score (accuracy lost) and the part of the cost.

        Raises ``UserError`` for a budget out of reach, without class scores, and for the state of another search.
        """
        bench = Workbench.of(model, decomposer, objective)
        space = Space(*self.budget(bench))
        dense = badness(model, objective, self.judged_by)
        identity = search_identity(self, bench, decomposer)
        search = BayesianSearch(space, self.evaluations, self.seed, self.state, identity)
        ranks, log = search.least(lambda ranks: self.proxy(space, ranks) - dense, "pars")
        result = space.bench.finish(ranks, log)
        if self.batch_norm:
            reestimate(result.model, model, objective, self.samples)
        return result

    def proxy(self, space: Space, ranks: Ranks) -> float:
        """What a candidate is judged by: its errors, or its loss, on calibration after the statistics followed."""
        cut, objective = space.bench.cut(ranks), space.bench.objective
        if self.batch_norm:
            reestimate(cut, space.bench.model, objective, self.samples)
        return badness(cut, objective, self.judged_by)
