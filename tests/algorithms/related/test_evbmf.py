"""The analytic rank is the planted one; the ranks found are moved by one factor where there is a budget."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from spectrim.algorithms.related import evbmf
from spectrim.algorithms.related.evbmf import EVBMF, evb_rank
from spectrim.decomposers.svd import SVD
from spectrim.decomposers.tucker2 import Tucker2
from spectrim.errors import UserError
from spectrim.statistics.objective import Objective


def planted(outputs: int, inputs: int, rank: int, noise: float, seed: int) -> np.ndarray:
    """Singular values of a matrix of ``rank`` components, twice as large as noise can look or more, plus noise."""
    random = np.random.default_rng(seed)
    edge = noise * (np.sqrt(outputs) + np.sqrt(inputs))  # the norm of the noise
    U, V = (np.linalg.qr(random.normal(size=(size, rank)))[0] for size in (outputs, inputs))
    W = U @ np.diag(edge * random.uniform(2, 8, rank)) @ V.T
    return np.linalg.svd(W + noise * random.normal(size=(outputs, inputs)), compute_uv=False)


@pytest.mark.parametrize(("outputs", "inputs"), [(24, 24), (30, 50), (100, 40), (32, 288)])
def test_finds_exactly_the_planted_rank_and_none_in_noise(outputs: int, inputs: int) -> None:
    for rank in (0, 1, 3, 8):
        for noise in (1e-3, 1.0):
            for seed in range(3):
                S_R = planted(outputs, inputs, rank, noise, seed)
                assert evb_rank(S_R, outputs, inputs) == rank
                assert evb_rank(S_R, inputs, outputs) == rank


@pytest.mark.parametrize("a", [0.05, 0.4, 1.0])
def test_a_component_is_kept_exactly_where_that_lowers_the_free_energy(a: float) -> None:
    """At the threshold the two free energies are equal (Nakajima et al. 2013); above it, keeping is the lower one."""
    threshold = evbmf._threshold(a)

    def gained_by_keeping(x: float) -> float:
        kept, dropped = (evbmf._free_energy(0.0, np.array([x]), a, bound) for bound in (0.0, np.inf))
        return dropped - kept

    assert gained_by_keeping(threshold) == pytest.approx(0, abs=1e-9)
    assert gained_by_keeping(0.99 * threshold) < 0 < gained_by_keeping(1.01 * threshold)
    assert threshold > (1 + np.sqrt(a)) ** 2  # the largest that noise looks, in the limit (Marchenko and Pastur)


@pytest.mark.parametrize(("values", "rank"), [([0, 0, 0], 0), ([1, 1, 1], 0), ([5, 0, 0], 1), ([3], 0)])
def test_degenerate_spectra(values: list[float], rank: int) -> None:
    assert evb_rank(np.array(values, dtype=float), len(values), 4) == rank


def noisy(net: nn.Sequential) -> nn.Sequential:
    """Layer 6 (24 x 256) of rank 5 plus noise; the others as they are drawn."""
    with torch.no_grad():
        net[6].weight.copy_(torch.randn(24, 5) @ torch.randn(5, 256) + 0.1 * torch.randn(24, 256))
    return net


def test_a_layer_keeps_its_analytic_rank_and_pure_noise_one_component(net: nn.Sequential, objective: Objective) -> None:
    noisy(net)[8].weight.data.normal_()
    result = EVBMF().compress(net, SVD(), objective)
    found = {entry["layer"]: (entry["analytic_rank"], entry["rank"]) for entry in result.log}
    assert found["6"] == (5, 5) and found["8"] == (0, 1)
    assert result.plan["6"].rank == 5 and result.plan["8"].rank == 1


def test_weaken_moves_each_rank_part_of_the_way_to_the_full_one(net: nn.Sequential, objective: Objective) -> None:
    result = EVBMF(weaken=0.25).compress(noisy(net), SVD(), objective)
    full = result.report.set_index("layer")["full_rank"]
    for entry in result.log:
        found = entry["analytic_rank"]
        assert entry["rank"] == max(1, round(found + 0.25 * (full[entry["layer"]] - found)))


@pytest.mark.parametrize("budget", [{"params_kept": 0.6}, {"macs_kept": 0.6}], ids=str)
def test_a_budget_scales_the_ranks_found_by_one_factor(
    budget: dict[str, Any], net: nn.Sequential, objective: Objective
) -> None:
    result = EVBMF(weaken=0.5, **budget).compress(net, SVD(), objective)
    kept = result.params_kept if "params_kept" in budget else result.macs_kept
    assert 0.5 < kept <= 0.6
    # Some factor lies within half a rank of every layer's.
    found = {entry["layer"]: entry["rank"] for entry in result.log}
    low = max((kept.rank - 0.5) / found[name] for name, kept in result.plan.items() if kept.rank > 1)
    high = min((kept.rank + 0.5) / found[name] for name, kept in result.plan.items())
    assert low <= high


def test_what_it_refuses_is_one_line(net: nn.Sequential, objective: Objective) -> None:
    for bad, said in (
        ({"weaken": 1.0}, "weaken must lie in"),
        ({"params_kept": 1.5}, "params_kept must lie in"),
        ({"params_kept": 0.5, "macs_kept": 0.5}, "exactly one"),
    ):
        with pytest.raises(UserError, match=said):
            EVBMF(**bad)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="out of reach"):
        EVBMF(params_kept=0.01).compress(net, SVD(), objective)
    with pytest.raises(UserError, match="layer 0: rank selection needs singular values"):
        EVBMF().compress(net, Tucker2(), objective)
