"""Slopes are believed as far as the components that they give up go together."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim
from spectrim.algorithms.shared.slopes import TRIED, believed, changes
from spectrim.statistics.fisher import GateGradients

SAMPLES, COMPONENTS, GAIN = 200, 300, 0.01


def keep_half(alone: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: own.argsort(descending=True)[: len(own) // 2] for name, own in alone.items()}


def rows(gain: float, together: float, noise: float = 0.02) -> dict[str, GateGradients]:
    """Return rows in which removing one of every other component gains ``gain``.

    ``together``: how much of each curvature these components share.
    """
    torch.manual_seed(0)
    gains = (torch.arange(COMPONENTS) % 2 == 0).float()
    given = gain * gains + noise * torch.randn(SAMPLES, COMPONENTS)
    own, shared = torch.randn(SAMPLES, COMPONENTS), torch.randn(SAMPLES, 1)
    sizes = torch.linspace(0.005, 0.08, COMPONENTS)[torch.randperm(COMPONENTS)]
    fisher = sizes * ((1 - together) ** 0.5 * own + together**0.5 * shared * gains)
    return {"a": GateGradients(given[:, :200], fisher[:, :200]), "b": GateGradients(given[:, 200:], fisher[:, 200:])}


def number(errors: float | None) -> float:
    return math.inf if errors is None else errors


def test_true_slopes_are_believed_and_slopes_of_chance_are_not() -> None:
    assert number(believed(rows(GAIN, 0.0), keep_half)) <= 4
    assert number(believed(rows(0.0, 0.0), keep_half)) >= 2


def test_slopes_are_believed_less_where_their_components_go_together() -> None:
    apart, together = (number(believed(rows(GAIN, part), keep_half)) for part in (0.0, 0.5))
    assert apart < together


def test_a_choice_is_judged_by_samples_that_did_not_make_it() -> None:
    given, seen = rows(GAIN, 0.2), list[float]()

    def choose(alone: Mapping[str, Tensor]) -> dict[str, Tensor]:
        seen.append(float(alone["a"].sum()))
        return keep_half(alone)

    assert believed(given, choose) in TRIED
    assert len(seen) == 2 * len(TRIED)
    for half, own in ((slice(0, 100), seen[-2]), (slice(100, 200), seen[-1])):  # the last one tried is no first order
        row = GateGradients(given["a"].given[half], given["a"].fisher[half])
        assert own == pytest.approx(float(changes(row, None).sum()))


def test_three_samples_tell_nothing() -> None:
    few = {name: GateGradients(row.given[:3], row.fisher[:3]) for name, row in rows(GAIN, 0.0).items()}
    assert believed(few, keep_half) is None


@pytest.mark.parametrize("ranks", ["knapsack", "greedy"])
def test_joint_selection_says_how_far_it_believes(net: nn.Module, batches: Any, ranks: Any) -> None:
    compressed: Callable[..., Any] = lambda errors: spectrim.compress(  # noqa: E731
        net,
        calibration=batches,
        algorithm=spectrim.Joint(params_kept=0.6, samples=40, refit=0, ranks=ranks, significance=errors),
    )
    found = compressed("auto")
    errors = found.log[0]["significance"]
    assert errors in TRIED
    assert found.plan == compressed(errors).plan
