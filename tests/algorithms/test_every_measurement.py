"""What holds for every measurement: it looks at a model, and compresses nothing."""

from typing import Any

import pytest
import torch
from torch import nn

import spectrim
from spectrim.algorithms.bound_probe import BoundProbe
from spectrim.algorithms.fine_tuning import FineTuning
from spectrim.algorithms.probe import Probe
from spectrim.algorithms.shared.compressed import Algorithm
from spectrim.algorithms.shared.measurement import Measurement
from spectrim.algorithms.truncation import Truncation
from spectrim.cli import messages, run
from spectrim.decomposers.svd import SVD
from spectrim.errors import UserError
from spectrim.statistics.batchnorm import BatchNorm
from spectrim.statistics.objective import Objective


@pytest.fixture(params=[Probe(ratios=[0.5]), BoundProbe(ratios=[0.5])], ids=["probe", "bound_probe"])
def measurement(request: pytest.FixtureRequest) -> Measurement:
    return request.param


def test_it_is_a_measurement_and_no_algorithm(measurement: Measurement) -> None:
    assert isinstance(measurement, Measurement) and not isinstance(measurement, Algorithm)
    assert not isinstance(Truncation(rank=1), Measurement)


def test_the_given_model_is_untouched(measurement: Measurement, net: nn.Sequential, objective: Objective) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    classes = [type(module) for module in net.modules()]
    found = measurement.measure(net, SVD(), objective)
    assert found.rows and all(row.keys() == found.rows[0].keys() for row in found.rows)
    assert [type(module) for module in net.modules()] == classes and net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_layer_that_stays_dense_is_noted(measurement: Measurement, net: nn.Sequential, objective: Objective) -> None:
    found = measurement.measure(nn.Sequential(nn.Conv2d(3, 3, 1, groups=3), *net), SVD(), objective)
    assert any(note.startswith("0: left dense: no rank is below break-even") for note in found.notes)


@pytest.mark.parametrize("name", ["probe", "bound_probe"])
@pytest.mark.parametrize("batch_norm", ["keep", "follow"])
def test_its_record_holds_the_rows_and_the_dense_model(
    compose: Any, digits: list[str], capsys: pytest.CaptureFixture, name: str, batch_norm: BatchNorm
) -> None:
    messages.configure()  # as the command does
    record = run.run(compose(*digits, f"algorithm={name}", f"batch_norm={batch_norm}"))
    assert record["compressed"] == record["dense"] and record["plan"] == {} and record["layers"] == []
    assert record["log"] and record["reporting"] == {} and record["samples_read"]["calibration"] > 0
    assert f"{len(record['log'])} rows measured, nothing compressed" in capsys.readouterr().out


def test_it_is_refused_where_an_algorithm_is_needed(measurement: Measurement) -> None:
    with pytest.raises(UserError, match="selector=.* is not of type Algorithm"):
        FineTuning(selector=measurement, recipe=spectrim.Recipe(epochs=1))  # type: ignore[arg-type]
