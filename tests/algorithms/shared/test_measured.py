"""Stored measurements are given back in their order, to the ranks that they were taken at and to no others."""

from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from spectrim.algorithms.shared.measured import Measurements
from spectrim.errors import UserError


def unexpected() -> list[float]:
    raise AssertionError("measured again")


def test_what_is_stored_is_not_measured_again(tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    first = Measurements(state, {"seed": 0}, Counter())
    assert first.next([3, 1], lambda: [0.25, 0.5]) == [0.25, 0.5]
    resumed = Measurements(state, {"seed": 0}, Counter())
    assert resumed.next([3, 1], unexpected) == [0.25, 0.5]
    assert resumed.next([2, 1], lambda: [0.75, 1.0]) == [0.75, 1.0]
    assert Measurements(state, {"seed": 0}, Counter()).rows == [[3, 1, 0.25, 0.5], [2, 1, 0.75, 1.0]]


def test_a_search_that_takes_another_way_measures_from_there_on(tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    first = Measurements(state, {}, Counter())
    for rank, score in ((3, 0.3), (2, 0.2), (1, 0.1)):
        first.next([rank], partial(list, [score]))
    other = Measurements(state, {}, Counter())  # its clock was faster: from the second on it asks for other ranks
    assert other.next([3], unexpected) == [0.3]
    assert other.next([5], lambda: [0.5]) == [0.5]
    assert other.next([1], lambda: [0.9]) == [0.9]
    assert Measurements(state, {}, Counter()).rows == [[3, 0.3], [5, 0.5], [1, 0.9]]


def test_the_file_of_another_search_is_refused(tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    Measurements(state, {"seed": 0}, Counter()).next([1], lambda: [0.0])
    with pytest.raises(UserError, match="belongs to a training or search with other settings"):
        Measurements(state, {"seed": 1}, Counter())


def test_a_stored_measurement_counts_what_it_read(tmp_path: Path) -> None:
    state = str(tmp_path / "state")

    def searched(read: Counter[str], rows: int) -> Counter[str]:
        def measure(row: int) -> list[float]:
            read["calibration"] += 10 + row
            return [row / 2]

        with Measurements.opened(state, {}, read) as measured:
            for row in range(rows):
                assert measured.next([row], partial(measure, row)) == [row / 2]
        return read

    assert searched(Counter(calibration=5), 2) == {"calibration": 5 + 10 + 11}
    assert searched(Counter(), 4) == {"calibration": 10 + 11 + 12 + 13}
    assert searched(Counter(), 4) == {"calibration": 10 + 11 + 12 + 13}


def test_a_file_in_use_is_refused_until_the_search_ends_however_it_ends(tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    with pytest.raises(ZeroDivisionError) as kept, Measurements.opened(state, {}, Counter()):
        with pytest.raises(UserError, match="is in use by process"), Measurements.opened(state, {}, Counter()):
            pass
        1 / 0  # noqa: B018
    with Measurements.opened(state, {}, Counter()):
        assert kept.value  # holds the frames of the search that failed
