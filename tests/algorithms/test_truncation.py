"""One rule for every layer: each keeps as much as the rule allows, and not one rank more."""

from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.truncation import Truncation
from spectrim.decomposers.svd import SVD
from spectrim.errors import UserError
from spectrim.statistics.objective import Objective


def cut(net: nn.Sequential, objective: Objective, view: Any = "channel", **rule: Any) -> Compressed:
    return Truncation(**rule).compress(net, SVD(view), objective)


def per_rank(compressed: Compressed) -> dict[str, int]:
    """Parameters of one component in each layer, from the shapes of the factors."""
    return {row.layer: row.params_after // row.rank for row in compressed.report.dropna().itertuples()}


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_rank_is_the_rank_of_every_layer_where_it_saves(net: nn.Sequential, objective: Objective, rank: int) -> None:
    report = cut(net, objective, rank=rank).report
    for row in report.itertuples():
        assert (None if pd.isna(row.rank) else row.rank) == (rank if rank <= row.break_even else None)
    assert report["rank"].notna().any()


@pytest.mark.parametrize("view", ["channel", "spatial"])
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.9])
def test_ratio_is_met_from_below_in_every_layer(
    net: nn.Sequential, objective: Objective, view: str, ratio: float
) -> None:
    compressed = cut(net, objective, view, ratio=ratio)
    step = per_rank(compressed)
    for row in compressed.report.dropna().itertuples():
        assert row.params_after <= ratio * row.params_before or row.rank == 1
        assert row.params_after + step[row.layer] > ratio * row.params_before


@pytest.mark.parametrize("energy", [0.3, 0.6, 0.8])
def test_energy_is_kept_by_the_smallest_rank(net: nn.Sequential, objective: Objective, energy: float) -> None:
    report = cut(net, objective, energy=energy).report
    for row in report.itertuples():
        weight = net.get_submodule(row.layer).weight.detach().double()
        groups = getattr(net.get_submodule(row.layer), "groups", 1)
        squares = torch.linalg.svdvals(weight.reshape(groups, len(weight) // groups, -1)).square().sum(0)
        kept = squares.cumsum(0) / squares.sum()
        smallest = 1 + int((kept < energy).sum())
        assert (None if pd.isna(row.rank) else row.rank) == (smallest if smallest <= row.break_even else None)
    assert report["rank"].notna().any()


@pytest.mark.parametrize("view", ["channel", "spatial"])
@pytest.mark.parametrize("params_kept", [0.3, 0.5, 0.8])
def test_budget_of_the_whole_model_is_met_from_below(
    net: nn.Sequential, objective: Objective, view: str, params_kept: float
) -> None:
    compressed = cut(net, objective, view, params_kept=params_kept)
    total = sum(p.numel() for p in net.parameters())
    used = sum(p.numel() for p in compressed.model.parameters())
    assert used <= params_kept * total
    assert compressed.params_kept == used / total
    slack = max(per_rank(compressed).values())  # the largest common ratio: some layer could not take its next component
    assert used + len(compressed.plan) * slack > params_kept * total


@pytest.mark.parametrize("params_kept", [0.3, 0.5, 0.8])
def test_a_common_energy_is_the_largest_that_the_budget_allows(
    net: nn.Sequential, objective: Objective, params_kept: float
) -> None:
    compressed = cut(net, objective, params_kept=params_kept, common="energy")
    assert compressed.params_kept <= params_kept
    lost = (compressed.report["relative_error"] ** 2).max()  # of the layer that loses most
    assert compressed.plan == cut(net, objective, energy=1 - 1.0001 * lost).plan
    assert cut(net, objective, energy=1 - 0.9999 * lost).params_kept > params_kept
    assert compressed.plan != cut(net, objective, params_kept=params_kept).plan


def test_the_more_is_kept_the_smaller_the_error(net: nn.Sequential, objective: Objective) -> None:
    errors = torch.tensor(
        [cut(net, objective, ratio=r).report["relative_error"].tolist() for r in (0.1, 0.3, 0.5, 0.7)]
    )
    assert (errors.diff(dim=0) <= 0).all()


def test_all_the_energy_keeps_every_layer_dense(net: nn.Sequential, objective: Objective) -> None:
    compressed = cut(net, objective, energy=1.0)
    assert not compressed.plan and compressed.params_kept == 1 and compressed.predicted_change == 0


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"rank": -3}, "rank must be at least 1, got -3"),
        ({"rank": "abc"}, "rank='abc' is none of: int, None"),
        ({"rank": 2.5}, "rank=2.5 is none of: int, None"),
        ({"ratio": 0}, r"ratio must lie in \(0, 1\], got 0"),
        ({"ratio": -0.5}, r"ratio must lie in \(0, 1\], got -0.5"),
        ({"ratio": 1.01}, r"ratio must lie in \(0, 1\], got 1.01"),
        ({"ratio": float("nan")}, r"ratio must lie in \(0, 1\], got nan"),
        ({"ratio": "half"}, "ratio='half' is none of: float, None"),
        ({"energy": 0.0}, "energy must lie in"),
        ({"params_kept": 2}, "params_kept must lie in"),
        ({}, "exactly one of rank, ratio, energy, params_kept; got none"),
        ({"ratio": 0.5, "common": "energy"}, "common=energy goes with params_kept alone, got ratio=0.5; leave common"),
        ({"params_kept": 0.5, "common": "rank"}, "common='rank' is none of: 'ratio', 'energy'"),
        ({"rank": 2, "ratio": 0.5}, "exactly one of rank, ratio, energy, params_kept"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(rule: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        Truncation(**rule)
    assert "\n" not in str(refusal.value)


def test_a_rank_above_full_and_a_budget_out_of_reach_are_refused(net: nn.Sequential, objective: Objective) -> None:
    with pytest.raises(UserError, match=r"rank 25 is above the full rank of every layer \(at most 24\)"):
        cut(net, objective, rank=25)
    with pytest.raises(UserError, match=r"params_kept=0.01 is out of reach: at rank 1 0\.\d+ of them remain"):
        cut(net, objective, params_kept=0.01)
