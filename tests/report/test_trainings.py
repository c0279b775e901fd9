"""Trainings: where a run starts, and what it cost."""

import math
from collections.abc import Callable
from typing import Any

from spectrim.report import trainings

Make = Callable[..., Any]


def test_a_run_without_a_checkpoint_starts_from_scratch(record: Make) -> None:
    one = record("lenet5_untrained")
    assert not trainings.from_scratch(one) and trainings.start(one) == "from a trained net"
    one["config"]["checkpoint"] = None
    assert trainings.from_scratch(one) and trainings.start(one) == "from scratch"
    assert trainings.net(one) == "lenet5"


def test_samples_of_all_kinds_are_added_and_a_record_without_a_count_has_none(record: Make) -> None:
    one = record()
    assert math.isnan(trainings.samples_read(one))
    assert trainings.samples_read(one | {"samples_read": {"calibration": 2000, "train": 500}}) == 2500


def test_the_seconds_of_a_shared_gpu_are_not_known(record: Make) -> None:
    one = record()
    assert trainings.seconds(one) == 2.5 and math.isnan(trainings.seconds(one, "cpu_seconds"))
    one["provenance"]["device"] = "cuda"
    assert math.isnan(trainings.seconds(one))
