"""Walk over the layers by first-order prediction, as lossless and compact optimisation do."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.neighbourhood import Neighbourhood, Norm
from spectrim.algorithms.shared.work import Outlook, Work
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.spectrum import Decomposer
from spectrim.errors import UserError
from spectrim.statistics.objective import NoGradient, Objective
from spectrim.statistics.switched_off import SWITCHED_OFF, switched_off
from spectrim.surgery import replacing
from spectrim.surgery.find_layers import left_dense
from spectrim.surgery.given_model import copied
from spectrim.tools.live import Bar
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
    ``verified_tolerance``: the rise of the loss above the dense model's that passes, at least 0.
    ``refresh``: whether to take a new gradient of the partly factored model before each layer.
    """

    verified: bool = False
    norm: Norm = "entrywise"
    gamma: float | None = 0.03
    split: Literal["calibration", "train"] = "calibration"
    verify_on: Literal["verification", "calibration", "train"] = "verification"
    order: Order = "network"
    tries: int = 4
    verified_tolerance: float = 0.0
    refresh: bool = False

    def __post_init__(self) -> None:
        Neighbourhood(self.norm, self.gamma)  # checks both where they are given
        if self.tries < 1:
            raise UserError(f"tries must be at least 1, got {self.tries}")
        if not self.verified_tolerance >= 0:
            raise UserError(f"verified_tolerance must be at least 0, got {self.verified_tolerance}")

    @abstractmethod
    def candidates(self, curve: Tensor, ranks: Tensor) -> Tensor:
        """Return the ranks to try in one layer, the preferred one first.

        ``curve``: the first-order change at every rank from 0, shape (R + 1,).
        ``ranks``: the ranks inside the neighbourhood, in ascending order.
        """

    def work(self, outlook: Outlook) -> Work:
        """Return the work: one gradient, and the tries where they are verified."""
        tried = (1 + outlook.layers * self.tries) * outlook.of(self.verify_on) if self.verified else 0
        passes = 1 + (outlook.layers - 1 if self.verified and self.refresh else 0)
        return Work(
            gradients=passes * outlook.of(self.split),
            evaluations=tried,
            largest_entries=self.norm == "entrywise" and self.gamma is not None,
            at_most=self.verified,
        )

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Select ranks and cut. Raises ``UserError`` for missing verification batches."""
        if self.verified:
            objective.given(self.verify_on)  # refused before the decomposition
        bench = Workbench.of(model, decomposer, objective)
        layers = self._opened(bench)
        chosen, log = (self._verified if self.verified else self._one_shot)(bench, layers)
        notes = left_dense({name: own.outside for name, own in layers.items() if own.outside}, bench.model)
        if not chosen and not bench.fixed:
            notes.append(self._nothing(layers))
        return bench.finish(chosen, log, notes)

    def _opened(self, bench: Workbench) -> dict[str, "_Layer"]:
        """Return what the first gradient says of each layer."""
        curves, near = bench.first_order(self.split), Neighbourhood(self.norm, self.gamma)
        layers = {name: _Layer(near.ranks(spectrum)) for name, spectrum in bench.spectra.items()}
        for name, layer in layers.items():
            self._predict(layer, curves.get(name))
        for name in switched_off(bench.model, layers.keys() - curves.keys(), bench.example):
            layers[name].outside = SWITCHED_OFF
        return layers

    def _predict(self, layer: "_Layer", curve: Tensor | None) -> None:
        """Set the first-order change and the candidates of ``layer``. None: the loss does not depend on it."""
        if curve is None:
            layer.outside = f"the {self.split} loss does not depend on it"
            layer.allowed, curve = layer.allowed[:0], torch.zeros(0)
        layer.curve, layer.listed = curve, self.candidates(curve, layer.allowed)

    def _nothing(self, layers: Mapping[str, "_Layer"]) -> str:
        """Return the note on a selection that factors no layer."""
        inside = sum(len(layer.allowed) > 0 for layer in layers.values())
        within = "" if self.gamma is None else f" within gamma={self.gamma} ({self.norm})"
        return (
            f"no layer is factored: {inside} of {len(layers)} layers have a rank{within}, and none of these ranks was "
            "chosen; to ask for a size, give a budget, as in Joint(params_kept=0.5)"
        )

    def _one_shot(self, bench: Workbench, layers: Mapping[str, "_Layer"]) -> tuple[dict[str, int], list[dict]]:
        chosen = {name: int(layer.listed[0]) for name, layer in layers.items() if len(layer.listed)}
        log: list[dict] = [
            {
                "layer": name,
                "inside": len(layer.allowed),
                "candidates": len(layer.listed),
                "rank": chosen.get(name),
                "predicted": float(layer.curve[chosen[name]]) if name in chosen else 0.0,
            }
            for name, layer in layers.items()
        ]
        return chosen, log

    def _verified(self, bench: Workbench, layers: Mapping[str, "_Layer"]) -> tuple[dict[str, int], list[dict]]:
        working = copied(bench.model)
        dense = bench.objective.evaluate(working, self.verify_on)
        loss, most = dense.loss, dense.loss + self.verified_tolerance
        chosen: dict[str, int] = {}
        log: list[dict] = []
        for name in Bar(self._ordered(bench, layers), "verify", unit="layer", leave=False):
            layer = layers[name]
            if self.refresh and chosen:
                self._predict(layer, self._refreshed(bench, working).get(name))
            for rank in _spread(layer.listed, self.tries):
                undo = replacing.replace(working, name, bench.spectra[name].factor(rank))
                measured = bench.objective.loss_within(working, self.verify_on, most, dense.n)
                log.append(
                    {
                        "layer": name,
                        "rank": rank,
                        "predicted": float(layer.curve[rank]),
                        "measured": None if measured is None else measured - loss,
                        "accepted": measured is not None,
                    }
                )
                if measured is not None:
                    chosen[name], loss = rank, measured
                    break
                undo()
        return chosen, log

    def _refreshed(self, bench: Workbench, working: nn.Module) -> dict[str, Tensor]:
        """Return the first-order changes at ``working``; none where its loss depends on none of its dense layers."""
        try:
            return bench.first_order(self.split, working)
        except NoGradient:
            return {}

    def _ordered(self, bench: Workbench, layers: Mapping[str, "_Layer"]) -> list[str]:
        """Return the layers to visit. A new gradient may give candidates to a layer that has none yet."""
        names = [name for name, layer in layers.items() if len(layer.allowed if self.refresh else layer.listed)]
        if self.order == "reverse":
            return names[::-1]
        if self.order == "saving":
            return sorted(names, key=lambda name: -bench.model.get_submodule(name).weight.numel())  # type: ignore[operator]
        if self.order == "predicted":
            return sorted(names, key=lambda name: layers[name].best())
        return names


@dataclass
class _Layer:
    """Hold what the walk knows of a layer.

    ``allowed``: the ranks inside the neighbourhood, in ascending order.
    ``curve``: the first-order change of the loss at every rank from 0, shape (R + 1,).
    ``listed``: the ranks to try, the preferred one first.
    ``outside``: why there is nothing to try; empty where the loss depends on the layer.
    """

    allowed: Tensor
    curve: Tensor = field(init=False)
    listed: Tensor = field(init=False)
    outside: str = field(init=False, default="")

    def best(self) -> float:
        """Return the first-order change at the preferred rank, 0 where there is none."""
        return float(self.curve[self.listed[0]]) if len(self.listed) else 0.0


def _spread(ranks: Tensor, tries: int) -> list[int]:
    """Return at most ``tries`` of ``ranks``: the first, the last, and others evenly between."""
    if len(ranks) <= tries:
        return ranks.tolist()
    if tries == 1:
        return [int(ranks[0])]
    return ranks[torch.linspace(0, len(ranks) - 1, tries).round().long()].tolist()
