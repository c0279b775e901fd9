"""What a selection is said to read is what it reads alone, whatever was remembered before it."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spectrim
from spectrim.algorithms.related.layer_threshold import LayerThreshold
from spectrim.algorithms.related.sensitivity import Sensitivity
from spectrim.statistics.objective import Objective
from spectrim.statistics.remembered import MEASUREMENTS, Remembered
from spectrim.tools.memo import Memory

WHITENED, PLAIN = spectrim.WhitenedSVD(view="channel"), spectrim.SVD()


def asked(remembered: Remembered, model: nn.Module, keys: str) -> int:
    """Ask for the results of ``keys``, each of which reads one sample; return how many were read by that."""
    before = remembered.read["calibration"]

    def make(key: str) -> str:
        remembered.read["calibration"] += 1
        return key.upper()

    for key in keys:
        assert remembered.get(model, "two", lambda key=key: key, lambda key=key: make(key)) == key.upper()  # type: ignore[misc]
    return remembered.read["calibration"] - before


@pytest.mark.parametrize("keys", ["a", "aa", "ab", "ba", "aca", "cab", "acab", "abcabc", "dddd"])
def test_a_selection_counts_what_it_reads_alone(keys: str) -> None:
    """Also where the cache is of two results, and what an earlier selection left there evicts others."""
    model = nn.Identity()
    alone = asked(Remembered(Memory(two=2), Counter()), model, keys)
    for earlier in ("", "a", "b", "ab", "abc", "cba"):
        remembered = Remembered(Memory(two=2), Counter())
        asked(remembered, model, earlier)
        remembered.start_selection()
        assert asked(remembered, model, keys) == alone


def test_nothing_is_spared_where_nothing_is_kept() -> None:
    remembered = Remembered(Memory(two=0), Counter())
    assert asked(remembered, nn.Identity(), "aaa") == 3


SELECTIONS = {
    "truncation": lambda: spectrim.Truncation(ratio=0.5).compress,
    "joint": lambda: spectrim.Joint(params_kept=0.6, refit=0, step=0.1).compress,
    "joint, smaller": lambda: spectrim.Joint(params_kept=0.4, refit=20, step=0.1).compress,
    "joint, tolerance": lambda: spectrim.Joint(max_loss_increase=0.01, refit=0).compress,
    "lossless": lambda: spectrim.Lossless(gamma=None, verified=True, refresh=True).compress,
    "sensitivity": lambda: Sensitivity(params_kept=0.5).compress,
    "thresholds": lambda: LayerThreshold(params_kept=0.5).compress,
    "thresholds, tolerance": lambda: LayerThreshold(params_kept=None, tolerance=0.02).compress,
}


def shared(batches: Any) -> Objective:
    """The objective of a grid, whose runs share what is remembered."""
    splits = {"calibration": batches, "verification": batches[1:]}
    return Objective(F.cross_entropy, splits, memory=Memory(whitened=1, gates=8, **MEASUREMENTS))


@pytest.mark.parametrize("decomposer", [PLAIN, WHITENED])
def test_the_runs_of_a_grid_count_the_same_in_any_order(net: nn.Sequential, batches: Any, decomposer: Any) -> None:
    alone, reports, logs = {}, {}, {}
    for name, selection in SELECTIONS.items():
        objective = shared(batches)
        result = selection()(net, decomposer, objective)
        alone[name], reports[name] = dict(objective.read), result.reporting["samples_read"]
        logs[name] = result.log
    for order in (list(SELECTIONS), list(SELECTIONS)[::-1]):
        objective = shared(batches)
        for name in order:
            objective.start_selection()
            result = SELECTIONS[name]()(net, decomposer, objective)
            assert dict(objective.read) == alone[name], name
            assert result.reporting["samples_read"] == reports[name], name
            assert result.log == logs[name], name


def test_what_is_remembered_is_not_read_again(net: nn.Sequential, batches: Any) -> None:
    passed = []

    def counted(logits: Any, targets: Any) -> Any:
        if torch.is_grad_enabled():  # not where it is checked to be a mean
            passed.append(len(targets))
        return F.cross_entropy(logits, targets)

    memory = Memory(whitened=1, gates=8, **MEASUREMENTS)
    objective = Objective(counted, {"calibration": batches}, memory=memory)
    for times in (1, 2):
        objective.start_selection()
        objective.gradients(net, ["0"])
        assert objective.read == {"calibration": 39} and sum(passed) == 39, times
