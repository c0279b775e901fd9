"""Predicted and measured change of the loss, one layer and one rank at a time."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from spectrim.algorithms.probe import Probe
from spectrim.decomposers.svd import SVD
from spectrim.errors import UserError
from spectrim.statistics.objective import Objective


@pytest.mark.parametrize("view", ["channel", "spatial"])
def test_every_step_is_measured_with_that_layer_alone_cut(net: nn.Sequential, objective: Objective, view: Any) -> None:
    found = Probe(ratios=(0.3, 0.8)).measure(net, SVD(view), objective)
    dense = objective.evaluate(net).loss
    gradients = objective.gradients(net, ["0", "3", "6", "8"])
    assert len(found.rows) > len(gradients)
    for step in found.rows:
        spectrum = SVD(view).spectrum(net.get_submodule(step["layer"]))
        alone = copy.deepcopy(net)
        alone[int(step["layer"])] = spectrum.factor(step["rank"])
        assert step["measured"] == pytest.approx(objective.evaluate(alone).loss - dense, abs=1e-6)
        predicted = spectrum.first_order(gradients[step["layer"]])[step["rank"]]
        assert step["predicted"] == pytest.approx(float(predicted), abs=1e-9)
        assert step["max_abs_error"] == pytest.approx(float(spectrum.largest_entry()[step["rank"]]))
        assert step["relative_error"] == pytest.approx(float(spectrum.relative_error()[step["rank"]]))


def test_ratios_are_of_the_full_rank(net: nn.Sequential, objective: Objective) -> None:
    rows = Probe(ratios=[0.25, 0.5, 0.97]).measure(net, SVD(), objective).rows
    assert [step["rank"] for step in rows if step["layer"] == "6"] == [6, 12, 23]


def test_small_steps_are_predicted_better(net: nn.Sequential, objective: Objective) -> None:
    rows = Probe(ratios=(0.1, 0.95)).measure(net, SVD(), objective).rows
    misses = torch.tensor([[abs(step["measured"] - step["predicted"]) for step in rows if step["layer"] == "6"]])
    assert misses[0, 1] < misses[0, 0]


@pytest.mark.parametrize("ratios", [[], [0.0], [1.0], [0.5, -0.1], ["half"], 0.5])
def test_ratios_that_cannot_be_are_refused(ratios: Any) -> None:
    with pytest.raises(UserError, match="ratios"):
        Probe(ratios=ratios)
