"""The largest setting that passes, within a number of steps."""

import pytest

from spectrim.algorithms.shared.bisection import bisect


@pytest.mark.parametrize("largest", [0.0, 0.1, 1 / 3, 0.999])
def test_it_ends_within_one_width_below_the_largest_that_passes(largest: float) -> None:
    tried: list[float] = []

    def at(setting: float) -> float | None:
        tried.append(setting)
        return setting if setting <= largest else None

    found = bisect(at, 0.0, 1.0, steps=10)
    assert len(tried) == 10 and tried[0] == 0.5
    assert found is None if largest < 2**-10 else largest - 2**-10 <= found <= largest


def test_the_interval_need_not_begin_at_zero() -> None:
    assert bisect(lambda setting: setting if setting <= -3 else None, -12.0, 12.0, 60) == pytest.approx(-3)


def test_a_result_that_is_empty_passes() -> None:
    assert bisect(lambda setting: {}, 0.0, 1.0, 3) == {}


def test_without_a_step_nothing_is_found() -> None:
    assert bisect(lambda setting: setting, 0.0, 1.0, 0) is None
