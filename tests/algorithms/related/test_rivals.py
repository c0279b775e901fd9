"""Each rival has the property that its paper states, and meets its budget."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from spectrim.algorithms.related.global_threshold import GlobalThreshold
from spectrim.algorithms.related.knapsack import Knapsack, relative_energy
from spectrim.algorithms.related.sensitivity import Sensitivity
from spectrim.decomposers.spectrum import spectrum_of
from spectrim.decomposers.svd import SVD
from spectrim.decomposers.whitened import WhitenedSVD
from spectrim.errors import UserError
from spectrim.statistics.objective import Objective

RIVALS: Any = [Knapsack, Sensitivity, GlobalThreshold]


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("decomposer", [SVD("channel"), WhitenedSVD("spatial", samples=30)], ids=str)
@pytest.mark.parametrize("budget", [{"params_kept": 0.6}, {"params_kept": None, "macs_kept": 0.6}], ids=str)
def test_meets_its_budget_from_below_and_is_cut_no_further_than_a_rank(
    rival: Any, decomposer: Any, budget: dict, net: nn.Sequential, objective: Objective
) -> None:
    result = rival(**budget).compress(net, decomposer, objective)
    kept = result.params_kept if budget["params_kept"] else result.macs_kept
    assert (0.4 if rival is not Sensitivity else 0) < kept <= 0.6  # one tolerance moves by whole ratios of layers


@pytest.mark.parametrize("rival", RIVALS)
def test_bad_budgets_are_one_line(rival: Any, net: nn.Sequential, objective: Objective) -> None:
    for bad, said in (({"params_kept": 1.0}, "must lie in"), ({"macs_kept": 0.5}, "exactly one")):
        with pytest.raises(UserError, match=said):
            rival(**bad)
    with pytest.raises(UserError, match="out of reach"):
        rival(params_kept=0.01).compress(net, SVD(), objective)


def test_knapsack_is_the_best_of_all_allocations_that_cost_no_more() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 8))
    with torch.no_grad():
        for layer, decay in zip(net, (0.3, 0.8, 0.6), strict=True):
            U, S, Vh = torch.linalg.svd(layer.weight, full_matrices=False)  # type: ignore[arg-type]
            layer.weight.copy_(U @ torch.diag(decay ** torch.arange(len(S)) * S[0]) @ Vh)  # type: ignore[operator]
    objective = Objective(nn.functional.cross_entropy, {"calibration": [(torch.randn(4, 8), torch.zeros(4).long())]})
    result = Knapsack(params_kept=0.6).compress(net, SVD(), objective)
    spectra = {name: spectrum_of(layer, SVD()) for name, layer in net.named_children()}
    energies = {name: relative_energy(spectrum) for name, spectrum in spectra.items()}

    def of(ranks: tuple[int | None, ...]) -> tuple[float, int]:
        error, params = 0.0, 0
        for (name, spectrum), rank in zip(spectra.items(), ranks, strict=True):
            error += 0.0 if rank is None else float(energies[name][rank])
            params += net.get_submodule(name).weight.numel() if rank is None else spectrum.cost(rank)  # type: ignore
        return error, params

    error, params = of(tuple(result.plan[name].rank if name in result.plan else None for name in spectra))
    options = [[None, *range(1, spectrum.break_even + 1)] for spectrum in spectra.values()]
    best = min(found for found, cost in map(of, itertools.product(*options)) if cost <= params)
    assert error == pytest.approx(best)


def test_sensitivity_takes_the_smallest_rank_within_one_tolerance(net: nn.Sequential, objective: Objective) -> None:
    result = Sensitivity(params_kept=0.6).compress(net, SVD(), objective)
    dense = objective.evaluate(net).loss
    for entry in result.log:  # measured with the other layers dense
        changed = torch.nn.Sequential(*net)
        changed[int(entry["layer"])] = spectrum_of(net.get_submodule(entry["layer"]), SVD()).factor(entry["rank"])
        assert objective.evaluate(changed).loss - dense == pytest.approx(entry["change"], abs=1e-6)
    by_layer: dict[str, list[dict]] = {}
    for entry in result.log:
        by_layer.setdefault(entry["layer"], []).append(entry)
    chosen = {name: kept.rank for name, kept in result.plan.items()}
    worst = {
        name: max(entry["change"] for entry in entries if entry["rank"] >= chosen[name])
        for name, entries in by_layer.items()
        if name in chosen
    }
    tolerance = max(worst.values())
    for name, entries in by_layer.items():  # nothing smaller would have been within the same tolerance
        below = [entry for entry in entries if entry["rank"] < chosen.get(name, 10**9)]
        next_smaller = max(below, key=lambda entry: entry["rank"], default=None)
        assert next_smaller is None or max(worst.get(name, -1e9), next_smaller["change"]) > tolerance


def test_sensitivity_measures_once_for_all_budgets(net: nn.Sequential, objective: Objective) -> None:
    first = Sensitivity(params_kept=0.6).compress(net, SVD(), objective)
    read = objective.read["calibration"]
    second = Sensitivity(params_kept=0.4).compress(net, SVD(), objective)
    assert second.log == first.log and objective.read["calibration"] - read < read / 5
    assert second.params_kept <= 0.4
    with torch.no_grad():
        net[0].weight.mul_(2)  # type: ignore[operator,union-attr]
    assert Sensitivity(params_kept=0.6).compress(net, SVD(), objective).log != first.log


def test_global_threshold_has_the_least_largest_relative_error(net: nn.Sequential, objective: Objective) -> None:
    """Of all allocations of the budget none has a smaller largest sigma_(k+1) / sigma_1 (ALDS, section 3.3)."""
    result = GlobalThreshold(params_kept=0.5).compress(net, SVD(), objective)
    spectra = {name: spectrum_of(net.get_submodule(name), SVD()) for name in ("0", "3", "6", "8")}
    relative = {name: s.svd.S_R.amax(0) / s.svd.S_R.max() for name, s in spectra.items()}  # type: ignore[attr-defined]
    largest = max(float(relative[name][kept.rank]) for name, kept in result.plan.items())
    dense = sum(parameter.numel() for parameter in net.parameters())
    total = dense
    for name, spectrum in spectra.items():  # the cheapest model with a smaller largest error
        needed = max(1, int((relative[name] >= largest).sum()))
        if needed <= spectrum.break_even:
            total -= net.get_submodule(name).weight.numel() - spectrum.cost(needed)  # type: ignore[operator]
    assert total > 0.5 * dense


def test_the_frobenius_threshold_prunes_the_smallest_singular_values_of_all_layers() -> None:
    """Every component that is kept is larger, in parts of its weight's norm, than every one that is dropped."""
    net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    one_large = torch.cat([torch.ones(1), torch.linspace(0.6, 0.1, 15)])
    relative = {}
    for (name, layer), S_R in zip(
        net.named_children(), (0.6 ** torch.arange(16), 0.8 ** torch.arange(16), one_large), strict=True
    ):
        U, _, Vh = torch.linalg.svd(torch.randn(16, 16))
        layer.weight.data = 3 * U @ S_R.diag() @ Vh
        relative[name] = (S_R / S_R.norm()).tolist()
    objective = Objective(nn.functional.cross_entropy, {"calibration": [(torch.randn(4, 16), torch.zeros(4).long())]})
    plan = GlobalThreshold(params_kept=0.55, norm="frobenius").compress(net, SVD(), objective).plan
    kept = min(relative[name][own.rank - 1] for name, own in plan.items())
    dropped = max(relative[name][own.rank] for name, own in plan.items())
    assert len(plan) == 3 and kept > dropped
    assert plan != GlobalThreshold(params_kept=0.55).compress(net, SVD(), objective).plan  # the spectral norm
