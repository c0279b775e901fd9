"""Where the first order is believed, and the greedy walk over layers that lossless and compact share."""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.spectrum import Decomposer, Spectrum
from spectrim.errors import UserError
from spectrim.factored.plan import RankPlan
from spectrim.statistics.objective import Objective
from spectrim.surgery import replacing
from spectrim.tools.settings import settings

Norm = Literal["entrywise", "relative", "frobenius"]
Order = Literal["network", "reverse", "saving", "predicted"]


@settings
class Neighbourhood:
    """How far from the trained weight a truncation may lie for its first-order prediction to be used.

    ``norm``: ``entrywise``, ``max |W_k - W|``, the condition that S1b states; ``relative``,
    ``||W_k - W||_F / ||W||_F``; or ``frobenius``, ``||W_k - W||_F``.
    ``gamma``: its largest allowed value; None allows every rank.
    """

    norm: Norm = "entrywise"
    gamma: float | None = None

    def __post_init__(self) -> None:
        if self.gamma is not None and not self.gamma > 0:
            raise UserError(f"gamma must be above 0 (or null, for no bound), got {self.gamma}")

    def ranks(self, spectrum: Spectrum) -> Tensor:
        """The ranks, rising, between 1 and break-even whose change lies inside."""
        ranks = torch.arange(1, spectrum.break_even + 1)
        if self.gamma is None:
            return ranks
        if self.norm == "entrywise":
            size = spectrum.largest_entry()
        else:
            size = spectrum.relative_error() if self.norm == "relative" else spectrum.error()
        return ranks[size[ranks] <= self.gamma]


@settings
class Walk(ABC):
    """The greedy selection over layers, among the ranks inside the neighbourhood of ``norm`` and ``gamma``.

    One-shot (``verified=False``): every layer takes its first candidate, all from one gradient. Verified: layer after
    layer, the loss on ``verify_on`` is measured after each change; a layer that lifts the loss more than ``budget``
    above the dense model's steps back to its next candidate, ``tries`` of them at most, spread evenly over the list,
    and stays dense if none passes. ``refresh`` takes the gradient anew, on the partly factored model, before each
    layer. ``order`` of the layers: as in the network, in reverse, largest possible saving first, most negative
    prediction first. ``split``: where the gradient comes from. ``verify_on`` should be another: ranks chosen and
    verified on the same samples fit their noise.
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
        """Those of one layer's allowed ``ranks`` to try, the preferred first, from its first-order ``curve``."""

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Select ranks and cut. The given model is left as it was."""
        bench = Workbench.of(model, decomposer, objective)
        curves = bench.first_order(self.split)
        near = Neighbourhood(self.norm, self.gamma)
        allowed = {name: near.ranks(spectrum) for name, spectrum in bench.spectra.items()}
        listed = {name: self.candidates(curves[name], allowed[name]) for name in bench.spectra}
        if self.verified:
            return self._verified(bench, curves, listed, allowed)
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
        for name in tqdm(self._ordered(bench, curves, listed), "verify", unit="layer", leave=False, disable=None):
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

    def _ordered(self, bench: Workbench, curves: dict[str, Tensor], listed: dict[str, Tensor]) -> list[str]:
        names = [name for name in bench.spectra if len(listed[name]) or self.refresh]
        if self.order == "reverse":
            return names[::-1]
        if self.order == "saving":
            return sorted(names, key=lambda name: -bench.model.get_submodule(name).weight.numel())  # type: ignore[operator]
        if self.order == "predicted":
            return sorted(names, key=lambda name: float(curves[name][listed[name][0]]) if len(listed[name]) else 0.0)
        return names


def _spread(ranks: Tensor, tries: int) -> list[int]:
    """At most ``tries`` of the candidates: the first, the last and evenly between."""
    if len(ranks) <= tries:
        return ranks.tolist()
    if tries == 1:
        return [int(ranks[0])]
    return ranks[torch.linspace(0, len(ranks) - 1, tries).round().long()].tolist()
