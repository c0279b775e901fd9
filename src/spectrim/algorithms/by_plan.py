"""Factor layers by a plan that is given: that of an earlier result, or ranks set by hand."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.work import Outlook, Work
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.best_view import PIVOTED
from spectrim.decomposers.spectrum import Decomposer
from spectrim.decomposers.svd import SVD
from spectrim.errors import UserError
from spectrim.factored.forms import PivotedForm
from spectrim.factored.plan import Kept, rank_of
from spectrim.statistics.objective import Objective


@dataclass(frozen=True)
class ByPlan:
    """Factor exactly the layers of ``plan``.

    ``plan``: a ``RankPlan``, or a rank for each layer by name.
    """

    plan: Mapping[str, Kept | int]

    def __post_init__(self) -> None:
        if not isinstance(self.plan, Mapping):
            raise UserError(f"plan={self.plan!r} is no plan; give a RankPlan, or a rank for each layer by name")
        for name, own in self.plan.items():
            if not isinstance(own, Kept) and (type(own) is not int or own < 1):
                raise UserError(f"plan[{name!r}]={own!r} is not a rank; give a whole number of at least 1")

    @property
    def decomposer(self) -> Decomposer:
        """The one that joint selection names for a plan with pivoted forms, plain SVD for any other."""
        forms = [own.form for own in self.plan.values() if isinstance(own, Kept)]
        return PIVOTED if any(isinstance(form, PivotedForm) for form in forms) else SVD()

    def work(self, outlook: Outlook) -> Work:
        """Return the work: nothing but decompositions."""
        ranks = {name: own if isinstance(own, int) else own.rank for name, own in self.plan.items()}
        return Work(ranks=ranks)

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Factor the layers. Raises ``UserError`` for a layer, a form or a rank that cannot be."""
        bench = Workbench.of(model, decomposer, objective)
        keep = {}
        for name, own in self.plan.items():
            if name not in bench.spectra:
                reasons = [note.partition(": ")[2] for note in bench.notes if note.startswith(f"{name}: ")]
                raise UserError(f"plan: {name!r} cannot be factored: {'; '.join(reasons) or 'there is no such layer'}")
            spectrum, wanted = bench.spectra[name], own if isinstance(own, int) else own.keep
            if rank_of(wanted) > spectrum.break_even:
                most = spectrum.break_even
                raise UserError(
                    f"plan[{name!r}]: rank {rank_of(wanted)} is above {most}, the largest that makes it smaller"
                )
            form = spectrum.kept(wanted).form
            if isinstance(own, Kept) and own.form != form:
                here, there = form.to_text(), own.form.to_text()
                raise UserError(f"plan[{name!r}] is of form {there!r}; pass its decomposer, this one gives {here!r}")
            keep[name] = wanted
        return bench.finish(keep)
