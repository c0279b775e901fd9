"""Compact takes, in each layer, the smallest rank whose first-order change is within the tolerance."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spectrim.algorithms.compact import Compact
from spectrim.algorithms.lossless import Lossless
from spectrim.batches import evaluating
from spectrim.decomposers.svd import SVD
from spectrim.errors import UserError
from spectrim.statistics.objective import Objective


@pytest.mark.parametrize("view", ["channel", "spatial"])
@pytest.mark.parametrize("tolerance", [0.0, 0.003, 1e9])
@pytest.mark.parametrize("gamma", [None, 0.12])
def test_each_layer_takes_the_smallest_admissible_rank(
    net: nn.Sequential,
    batches: Any,
    objective: Objective,
    weight_of: Any,
    view: Any,
    tolerance: float,
    gamma: float | None,
) -> None:
    compressed = Compact(tolerance=tolerance, gamma=gamma).compress(net, SVD(view), objective)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    for row in compressed.report.itertuples():
        layer = net.get_submodule(row.layer)
        with evaluating(net):
            (gradient,) = torch.autograd.grad(F.cross_entropy(net(x), y), layer.weight)
        smallest = None
        for rank in range(1, row.break_even + 1):
            factored = SVD(view).spectrum(layer).factor(rank)
            change = weight_of(factored, getattr(layer, "groups", 1)) - layer.weight
            near = gamma is None or change.abs().max() <= gamma
            if near and (gradient * change).sum() <= tolerance:
                smallest = rank
                break
        assert (compressed.plan[row.layer].rank if row.layer in compressed.plan else None) == smallest
    assert compressed.plan or gamma


def test_compact_is_at_least_as_small_as_lossless(net: nn.Sequential, objective: Objective) -> None:
    compact, lossless = (kind().compress(net, SVD(), objective) for kind in (Compact, Lossless))
    for name, kept in lossless.plan.items():
        assert compact.plan[name].rank <= kept.rank
    assert compact.params_kept <= lossless.params_kept and compact.predicted_change >= lossless.predicted_change


def test_a_larger_tolerance_never_keeps_more(net: nn.Sequential, objective: Objective) -> None:
    kept = [
        Compact(gamma=None, tolerance=t).compress(net, SVD(), objective).params_kept for t in (0, 1e-3, 1e-2, 1e-1, 1e9)
    ]
    assert kept == sorted(kept, reverse=True) and kept[-1] < 0.2


@pytest.mark.parametrize("tolerance", [0.0, 0.05])
@pytest.mark.parametrize("refresh", [False, True])
def test_verified_never_lifts_the_loss_above_the_tolerance(
    net: nn.Sequential, objective: Objective, tolerance: float, refresh: bool
) -> None:
    compressed = Compact(
        gamma=None, verified=True, verify_on="calibration", verified_tolerance=tolerance, refresh=refresh
    ).compress(net, SVD(), objective)
    assert objective.evaluate(compressed.model).loss <= objective.evaluate(net).loss + tolerance
    for step in compressed.log:
        assert step["accepted"] == (
            compressed.plan.get(step["layer"]) is not None and step is last_of(compressed, step)
        )


def test_no_change_at_all_is_within_a_tolerance_of_zero(net: nn.Sequential, batches: Any) -> None:
    flat = Objective(lambda logits, targets: logits.sum() * 0 + 1, {"calibration": batches})
    for verified in (False, True):
        plan = Compact(gamma=None, verified=verified, verify_on="calibration").compress(net, SVD(), flat).plan
        assert {kept.rank for kept in plan.values()} == {1} and len(plan) == 4


@pytest.mark.parametrize("offset", [0.0, -5.0])
def test_verified_takes_losses_of_either_sign(net: nn.Sequential, batches: Any, offset: float) -> None:
    shifted = Objective(lambda logits, targets: F.cross_entropy(logits, targets) + offset, {"calibration": batches})
    compressed = Compact(gamma=None, verified=True, verify_on="calibration", verified_tolerance=0.01).compress(
        net, SVD(), shifted
    )
    assert compressed.plan
    assert shifted.evaluate(compressed.model).loss <= shifted.evaluate(net).loss + 0.01


def last_of(compressed: Any, step: dict) -> dict:
    return [other for other in compressed.log if other["layer"] == step["layer"]][-1]


@pytest.mark.parametrize("bad", [-1e-9, float("nan"), "small"])
def test_a_tolerance_that_cannot_be_is_refused(bad: Any) -> None:
    with pytest.raises(UserError, match="tolerance"):
        Compact(gamma=None, tolerance=bad)
