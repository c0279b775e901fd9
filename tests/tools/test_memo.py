"""What a memory keeps, and for how long; and what a grid of runs is spared by it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spectrim
from spectrim.statistics.objective import Objective
from spectrim.tools.memo import Memory


def asked(memory: Memory, model: nn.Module, kind: str, key: int, made: list[int]) -> int:
    def make() -> int:
        made.append(key)
        return 10 * key

    return memory.get(model, kind, lambda: key, make)


def test_the_oldest_of_a_kind_gives_way() -> None:
    memory, model, made = Memory(two=2), nn.Identity(), list[int]()
    assert [asked(memory, model, "two", key, made) for key in (1, 2, 1, 3, 2, 1)] == [10, 20, 10, 30, 20, 10]
    assert made == [1, 2, 3, 1]
    made.clear()
    for key in (1, 1, 2, 1):
        asked(memory, model, "one where nothing is said", key, made)
    assert made == [1, 2, 1]


def test_nothing_is_kept_where_none_is_asked_for() -> None:
    memory, made = Memory(none=0), list[int]()
    for _ in range(2):
        asked(memory, nn.Identity(), "none", 1, made)
    assert made == [1, 1]


@pytest.mark.parametrize("decomposer", [spectrim.WhitenedSVD(view="channel"), spectrim.SVD()])
def test_the_budgets_of_a_grid_share_moments_and_gates(net: nn.Sequential, batches: Any, decomposer: Any) -> None:
    def joint(kept: float) -> spectrim.Joint:
        return spectrim.Joint(params_kept=kept, refit=0, step=0.1)

    splits = {"calibration": batches}
    shared = Objective(F.cross_entropy, splits, memory=Memory(whitened=1, gates=16))
    first = joint(0.8).compress(net, decomposer, shared)
    before = shared.read["calibration"]
    second = joint(0.6).compress(net, decomposer, shared)
    alone = Objective(F.cross_entropy, splits)
    expected = joint(0.6).compress(net, decomposer, alone)
    assert second.plan == expected.plan and second.log == expected.log
    assert first.plan != second.plan and first.log == second.log[:2]
    # The moments, and linearisations at points where a search has been: the first two at the least, more where the
    # block of a dense layer overshoots a step.
    known, again = set(_starts(first)), 0
    for start in _starts(second):
        again += start in known
        known.add(start)
    spared = (again + bool(decomposer.samples)) * sum(len(labels) for _, labels in batches)
    assert again >= 2
    assert alone.read["calibration"] - (shared.read["calibration"] - before) == spared


def _starts(result: spectrim.Compressed) -> list[float]:
    """The shares of the cost at which a search linearised."""
    return [1.0, *(entry["share"] for entry in result.log[:-1])]


def test_a_changed_model_is_searched_anew(net: nn.Sequential, batches: Any) -> None:
    objective = Objective(F.cross_entropy, {"calibration": batches}, memory=Memory(whitened=1, gates=16))
    joint, decomposer = spectrim.Joint(params_kept=0.8, refit=0), spectrim.WhitenedSVD(view="channel")
    joint.compress(net, decomposer, objective)
    with torch.no_grad():
        net[0].weight.mul_(torch.rand_like(net[0].weight))
    changed = joint.compress(net, decomposer, objective)
    alone = joint.compress(net, decomposer, Objective(F.cross_entropy, {"calibration": batches}))
    assert changed.plan == alone.plan and changed.log == alone.log
