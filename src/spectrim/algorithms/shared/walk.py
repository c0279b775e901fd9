"""The greedy walk over layers, by first-order prediction, that lossless and compact optimisation share."""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.neighbourhood import Neighbourhood, Norm
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.spectrum import Decomposer
from spectrim.errors import UserError
from spectrim.factored.plan import RankPlan
from spectrim.statistics.objective import Objective
from spectrim.surgery import replacing
from spectrim.tools.settings import settings

Order = Literal["network", "reverse", "saving", "predicted"]


@settings
class Walk(ABC):
    """Choose a rank for each layer by the first-order change of the loss, among the ranks inside a neighbourhood.

    One-shot: every layer takes its first candidate, and all predictions come from one gradient. Verified: the layers
    are visited one after another, and the loss is measured after each change. A layer whose change raises the loss too
    far goes back and tries its next candidate. It stays dense if none passes.

    ``verified``: whether to verify.
    ``norm``, ``gamma``: the neighbourhood (``Neighbourhood``).
    ``split``: the split from which the gradient comes.
    ``verify_on``: the split on which the loss is verified. It should differ from ``split``, because ranks that are
        chosen and verified on the same samples fit their noise.
    ``order``: the order of the visits: as in the network, in reverse, by largest possible saving, or by most negative
        prediction.
    ``tries``: the largest number of candidates that a layer tries, spread evenly over its list.
    ``budget``: the rise of the loss above the dense model's that passes, at least 0.
    ``refresh``: whether to take a new gradient of the partly factored model before each layer.
    """

    verified: bool = False
    norm: Norm = "entrywise"
    gamma: float | None = 0.03
    split: Literal["calibration", "train"] = "calibration"
    verify_on: Literal["verification", "calibration", "train"] = "verification"
    order: Order = "network"
    tries: int = 4
    budget: float = 0.0
    refresh: bool = False

    def __post_init__(self) -> None:
        Neighbourhood(self.norm, self.gamma)  # checks both where they are given
        if self.tries < 1:
            raise UserError(f"tries must be at least 1, got {self.tries}")
        if not self.budget >= 0:
            raise UserError(f"budget, a rise of the loss, must be at least 0, got {self.budget}")

    @abstractmethod
    def candidates(self, curve: Tensor, ranks: Tensor) -> Tensor:
        """Return the ranks to try in one layer, the preferred one first.

        ``curve``: the first-order change at every rank from 0, shape (R + 1,).
        ``ranks``: the ranks inside the neighbourhood, in ascending order.
        """

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Select ranks and cut. Raises ``UserError`` for missing verification batches."""
        if self.verified:
            objective.given(self.verify_on)  # refused before the decomposition
        bench = Workbench.of(model, decomposer, objective)
        curves = bench.first_order(self.split)
        near = Neighbourhood(self.norm, self.gamma)
        allowed = {name: near.ranks(spectrum) for name, spectrum in bench.spectra.items()}
        outside = [name for name in bench.spectra if name not in curves]
        allowed |= {name: allowed[name][:0] for name in outside}
        curves |= {name: torch.zeros(bench.spectra[name].max_rank + 1) for name in outside}
        listed = {name: self.candidates(curves[name], allowed[name]) for name in bench.spectra}
        choose = self._verified if self.verified else self._one_shot
        result = choose(bench, curves, listed, allowed)
        notes = [f"{name}: left dense: the {self.split} loss does not depend on it" for name in outside]
        return replace(result, notes=[*result.notes, *notes, *([] if result.plan else [self._nothing(allowed)])])

    def _nothing(self, allowed: dict[str, Tensor]) -> str:
        """Return the note on a selection that factors no layer."""
        inside = sum(len(ranks) > 0 for ranks in allowed.values())
        within = "" if self.gamma is None else f" within gamma={self.gamma} ({self.norm})"
        return (
            f"no layer is factored: {inside} of {len(allowed)} layers have a rank{within}, and none of these ranks was "
            "chosen; to ask for a size, give a budget, as in Joint(params_kept=0.5)"
        )

    def _one_shot(
        self,
        bench: Workbench,
        curves: dict[str, Tensor],
        listed: dict[str, Tensor],
        allowed: dict[str, Tensor],
    ) -> Compressed:
        chosen = {name: int(ranks[0]) for name, ranks in listed.items() if len(ranks)}
        log: list[dict] = [
            {
                "layer": name,
                "inside": len(allowed[name]),
                "candidates": len(listed[name]),
                "rank": chosen.get(name),
                "predicted": float(curves[name][chosen[name]]) if name in chosen else 0.0,
            }
            for name in bench.spectra
        ]
        return bench.finish(chosen, log)

    def _verified(
        self,
        bench: Workbench,
        curves: dict[str, Tensor],
        listed: dict[str, Tensor],
        allowed: dict[str, Tensor],
    ) -> Compressed:
        working = replacing.apply(bench.model, RankPlan(), {})
        dense = bench.objective.evaluate(working, self.verify_on)
        loss = dense.loss
        chosen: dict[str, int] = {}
        log: list[dict] = []
        names = self._ordered(bench, curves, listed, allowed)
        for name in tqdm(names, "verify", unit="layer", leave=False, disable=None):
            if self.refresh and chosen:
                curve = bench.first_order(self.split, working)[name]
                curves[name], listed[name] = curve, self.candidates(curve, allowed[name])
            dense_layer = working.get_submodule(name)
            for rank in _spread(listed[name], self.tries):
                replacing.replace(working, name, bench.spectra[name].factor(rank))
                measured = bench.objective.loss_within(working, self.verify_on, dense.loss + self.budget, dense.n)
                log.append(
                    {
                        "layer": name,
                        "rank": rank,
                        "predicted": float(curves[name][rank]),
                        "measured": None if measured is None else measured - loss,
                        "accepted": measured is not None,
                    }
                )
                if measured is not None:
                    chosen[name], loss = rank, measured
                    break
                replacing.replace(working, name, dense_layer)
        return bench.finish(chosen, log)

    def _ordered(
        self, bench: Workbench, curves: dict[str, Tensor], listed: dict[str, Tensor], allowed: dict[str, Tensor]
    ) -> list[str]:
        """Return the layers to visit. A new gradient may give candidates to a layer that has none yet."""
        names = [name for name in bench.spectra if len(allowed[name] if self.refresh else listed[name])]
        if self.order == "reverse":
            return names[::-1]
        if self.order == "saving":
            return sorted(names, key=lambda name: -bench.model.get_submodule(name).weight.numel())  # type: ignore[operator]
        if self.order == "predicted":
            return sorted(names, key=lambda name: float(curves[name][listed[name][0]]) if len(listed[name]) else 0.0)
        return names


def _spread(ranks: Tensor, tries: int) -> list[int]:
    """Return at most ``tries`` of ``ranks``: the first, the last, and others evenly between."""
    if len(ranks) <= tries:
        return ranks.tolist()
    if tries == 1:
        return [int(ranks[0])]
    return ranks[torch.linspace(0, len(ranks) - 1, tries).round().long()].tolist()
