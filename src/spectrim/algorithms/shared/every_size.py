"""Save every size of a model in one file, and choose the size when it is loaded.

Joint selection that expands the loss once, at the dense model, gives each component a price that no budget changes.
The components kept of a layer are those of the highest predicted change, so a smaller set is a part of a larger one. A
file holds all components, their predicted changes and what each rank costs. Reading it solves the knapsack for the
budget that is asked for, and takes the components of that plan. Pivots change with the rank: they are taken then.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from spectrim.algorithms.shared.budget import Costs, costs_of
from spectrim.algorithms.shared.removal import Gated, keep_dearest
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.batches import Batches
from spectrim.checkpoints import every_size
from spectrim.decomposers.spectrum import Spectrum
from spectrim.default_losses import default_loss
from spectrim.errors import UserError
from spectrim.factored.forms import EmbeddingForm, Form, PivotedForm, PlainForm
from spectrim.factored.plan import Kept, RankPlan
from spectrim.losses import Loss
from spectrim.refit import factors
from spectrim.refit.weighting import RefitBy, output_weights
from spectrim.statistics.collated import with_decoder_inputs
from spectrim.statistics.objective import Objective
from spectrim.surgery import replacing
from spectrim.surgery.given_model import copied, versions
from spectrim.surgery.reopening import factored_layers
from spectrim.surgery.unpacking import pack, unpacked
from spectrim.tools import digests
from spectrim.tools.alone import alone
from spectrim.tools.precision import exact, uncached
from spectrim.tools.safetensors_stream import Shard


class _Sizes(NamedTuple):
    """What a plan is chosen from.

    ``whole``: the plan that keeps all components, in plain factors.
    ``changes``: the predicted change of the loss by each component of each layer whose rank is chosen, shape (R,).
    ``costs``: what these layers cost at every rank.
    ``pivoted``: the largest rank of each layer whose factors are pivoted; 0 for plain factors.
    ``fixed``: what is kept of the layers whose rank the user has set.
    ``refit``, ``refit_by``: number of samples of the refit, and what it makes small.
    """

    whole: RankPlan
    changes: Mapping[str, Tensor]
    costs: Costs
    pivoted: Mapping[str, int]
    fixed: RankPlan
    refit: int
    refit_by: RefitBy

    def plan(self, params_kept: float) -> RankPlan:
        """Return the plan for a budget. Raises ``UserError`` for one out of reach."""
        self.costs.require(params_kept)
        curves, dense = self.costs.curves, self.costs.dense
        layers = {name: Gated(own, curves[name], dense[name]) for name, own in self.changes.items()}
        found = keep_dearest(layers, self.costs.of_layers(params_kept, layers)).kept
        kept = {name: tuple(own.tolist()) for name, own in found.items() if self.costs.pays(name, len(own))}
        forms = {name: _form(self.whole[name].form, len(own) <= self.pivoted[name]) for name, own in kept.items()}
        return RankPlan.of({**self.fixed, **{name: Kept(own, forms[name]) for name, own in kept.items()}})

    def text(self) -> str:
        costs = {"total": self.costs.total, "fixed": self.costs.fixed, "dense": self.costs.dense}
        kept = {
            "refit": self.refit,
            "refit_by": self.refit_by,
            "pivoted": dict(self.pivoted),
            "fixed": self.fixed.as_dict(),
        }
        return json.dumps({"costs": costs, **kept}, sort_keys=True)

    def tensors(self) -> dict[str, Tensor]:
        changes = {f"{name}.changes": own for name, own in self.changes.items()}
        return changes | {f"{name}.costs": own for name, own in self.costs.curves.items()}

    @classmethod
    def read(cls, shard: Shard) -> "_Sizes":
        """Read what ``text`` and ``tensors`` wrote. Raises ``UserError`` where the parts do not fit together."""
        try:
            plain = json.loads(shard.metadata["sizes"])
            names = list(plain["costs"]["dense"])
            changes, curves = ({name: shard.read(f"{name}.{part}") for name in names} for part in ("changes", "costs"))
            costs = Costs("params", curves=curves, **plain["costs"])
            if any(len(curves[name]) != len(changes[name]) + 1 for name in names):
                raise ValueError("costs and changes are not of one length")
            whole, fixed = (RankPlan.from_json(text) for text in (shard.metadata["plan"], json.dumps(plain["fixed"])))
            if whole.keys() != {*names, *fixed}:
                raise ValueError("they are of other layers than the components")
            pivoted = {name: int(plain["pivoted"][name]) for name in names}
            refit_by = plain.get("refit_by", "outputs")  # older files do not say it
            if refit_by not in get_args(RefitBy):
                raise ValueError(f"refit_by is {refit_by!r}")
            return cls(whole, changes, costs, pivoted, fixed, int(plain["refit"]), refit_by)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{shard.path} is damaged: its sizes cannot be read ({error}); write it again") from None


def _form(plain: Form, is_pivoted: bool) -> Form:
    if is_pivoted and isinstance(plain, PlainForm):
        return PivotedForm(plain.view)
    return replace(plain, pivoted=True) if is_pivoted and isinstance(plain, EmbeddingForm) else plain


def _most_pivots(spectrum: Spectrum) -> int:
    """Return the largest rank whose factors are pivoted; 0 where none are."""
    pivoted = _form(spectrum.plain().kept(spectrum.max_rank).form, True)
    return max((k for k in range(1, spectrum.max_rank + 1) if spectrum.kept(k).form == pivoted), default=0)


@dataclass(frozen=True)
class EverySize:
    """The choice between the sizes of a model, as a selection leaves it.

    ``layers``: the expansion of the loss at the dense model.
    ``refit``, ``refit_by``: number of samples of the refit that each size gets, and what it makes small.
    """

    bench: Workbench
    layers: Mapping[str, Gated]
    refit: int
    refit_by: RefitBy
    then: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.bench.restore()
        object.__setattr__(self, "then", versions(self.bench.given))

    def save(self, path: Path) -> None:
        """Write the file. Raises ``UserError`` where the given model was factored already, or has changed since."""
        bench = self.bench
        if factored_layers(bench.given):
            raise UserError("a file of every size is made from a dense model; compress the dense one")
        if versions(bench.given) != self.then:
            raise UserError("the given model has changed since it was compressed; compress it again, then save")
        sizes = self._sizes()
        spectra = {name: bench.all_spectra[name].plain() for name in sizes.whole}
        model = pack(replacing.apply(bench.model, sizes.whole, spectra, shared=True))
        every_size.save(path, model, sizes.whole, bench.given, sizes.text(), sizes.tensors())

    def _sizes(self) -> _Sizes:
        costs = costs_of(self.bench, "params")
        dense = {name: costs.dense[name] for name in self.layers}
        costs = replace(costs, dense=dense, curves={name: costs.curves[name] for name in dense})
        pivoted = {name: _most_pivots(self.bench.spectra[name]) for name in dense}
        fixed = {name: spectrum.kept(rank) for name, (spectrum, rank) in self.bench.fixed.items()}
        changes = {name: own.alone_R.double().cpu() for name, own in self.layers.items()}
        plain = {name: self.bench.all_spectra[name].plain() for name in [*changes, *fixed]}
        whole = replacing.plan_of(plain, {name: spectrum.max_rank for name, spectrum in plain.items()})
        return _Sizes(whole, changes, costs, pivoted, RankPlan.of(fixed), self.refit, self.refit_by)


def load(
    path: Path,
    into: nn.Module,
    params_kept: float,
    sha256: str | None = None,
    calibration: Batches | None = None,
    loss: Loss | None = None,
) -> nn.Module:
    """Factor ``into`` by the plan for ``params_kept``, fill it from a file of every size, and return it.

    ``calibration``: batches for the refit of the factors at this size; None leaves them as they are cut.
    ``loss``: the loss by which the refit weighs outputs; None: the default one of the model.

    Raises ``UserError`` for a size out of reach, another kind of file, another model, and a file made without a refit.
    """
    if isinstance(params_kept, bool) or not isinstance(params_kept, int | float) or not 0 < params_kept <= 1:
        raise UserError(f"params_kept must lie in (0, 1], got {params_kept!r}")
    if sha256 is not None:
        digests.require(path, sha256)
    shard = every_size.verified(path)
    sizes = _Sizes.read(shard)
    plan = sizes.plan(params_kept)
    if calibration is None:
        return every_size.filled(into, shard, plan)
    if not sizes.refit:
        raise UserError(f"{path} was made without a refit (refit=0); leave calibration= out")
    objective = Objective(loss or default_loss(into), {"calibration": with_decoder_inputs(calibration, into)})
    with torch.inference_mode(False), uncached(), exact(), alone():
        dense = unpacked(every_size.filled(copied(into), shard, RankPlan()))
        weights = output_weights(sizes.refit_by, dense, sizes.whole, objective, sizes.refit)
        model = every_size.filled(into, shard, plan)  # what fails before leaves ``into`` as it is
        factors.refit(model, dense, objective, sizes.refit, weights=weights)
    return model
