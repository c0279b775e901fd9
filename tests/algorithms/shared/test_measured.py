"""Stored measurements are given back in their order, to the ranks that they were taken at and to no others."""

from functools import partial
from pathlib import Path

import pytest

from spectrim.algorithms.shared.measured import Measurements
from spectrim.errors import UserError


def unexpected() -> list[float]:
    raise AssertionError("measured again")


def test_what_is_stored_is_not_measured_again(tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    first = Measurements(state, {"seed": 0})
    assert first.next([3, 1], lambda: [0.25, 0.5]) == [0.25, 0.5]
    resumed = Measurements(state, {"seed": 0})
    assert resumed.next([3, 1], unexpected) == [0.25, 0.5]
    assert resumed.next([2, 1], lambda: [0.75, 1.0]) == [0.75, 1.0]
    assert Measurements(state, {"seed": 0}).rows == [[3, 1, 0.25, 0.5], [2, 1, 0.75, 1.0]]


def test_a_search_that_takes_another_way_measures_from_there_on(tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    first = Measurements(state, {})
    for rank, score in ((3, 0.3), (2, 0.2), (1, 0.1)):
        first.next([rank], partial(list, [score]))
    other = Measurements(state, {})  # its clock was faster: from the second on it asks for other ranks
    assert other.next([3], unexpected) == [0.3]
    assert other.next([5], lambda: [0.5]) == [0.5]
    assert other.next([1], lambda: [0.9]) == [0.9]
    assert Measurements(state, {}).rows == [[3, 0.3], [5, 0.5], [1, 0.9]]


def test_the_file_of_another_search_is_refused(tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    Measurements(state, {"seed": 0}).next([1], lambda: [0.0])
    with pytest.raises(UserError, match="belongs to a training or search with other settings"):
        Measurements(state, {"seed": 1})
