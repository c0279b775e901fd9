"""A length of time is told in the unit that suits it."""

import pytest

from spectrim.tools.profiling import duration


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.24, "0.2 s"), (89.0, "89.0 s"), (90.0, "2 min"), (5399.0, "90 min"), (5400.0, "1.5 h")]
)
def test_a_length_of_time_has_the_unit_that_suits_it(seconds: float, said: str) -> None:
    assert duration(seconds, 1) == said
    assert duration(seconds) == said.replace("0.2", "0").replace("89.0", "89")
