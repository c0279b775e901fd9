"""Settings are frozen, and a value of the wrong type is refused in one line."""

from collections.abc import Sequence
from dataclasses import FrozenInstanceError, asdict
from typing import Any, Literal

import pytest

from spectrim.errors import UserError
from spectrim.settings import settings


@settings
class Example:
    """One field of each kind that the package uses."""

    rank: int | None = None
    ratio: float = 0.5
    view: Literal["channel", "spatial"] = "channel"
    flag: bool = False
    ratios: Sequence[float] = (0.5,)

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:  # may rely on the type: the check of types comes first
            raise UserError("rank must be at least 1")


@pytest.mark.parametrize(
    "good", [{}, {"rank": 3}, {"ratio": 1}, {"view": "spatial"}, {"flag": True}, {"ratios": [0.1, 1]}, {"ratios": ()}]
)
def test_values_of_the_declared_type_are_kept(good: dict[str, Any]) -> None:
    assert asdict(Example(**good)) == asdict(Example()) | good


@pytest.mark.parametrize(
    "bad",
    [
        {"rank": "abc"},
        {"rank": 2.5},
        {"ratio": "0.5"},
        {"ratio": None},
        {"view": "diagonal"},
        {"flag": 1},
        {"flag": "yes"},
        {"ratios": 0.5},
        {"ratios": ["half"]},
    ],
)
def test_values_of_another_type_are_refused_in_one_line(bad: dict[str, Any]) -> None:
    ((name, value),) = bad.items()
    with pytest.raises(UserError) as refusal:
        Example(**bad)
    assert str(refusal.value).startswith(f"Example: {name}={value!r} is not of type ")
    assert "\n" not in str(refusal.value)


def test_the_own_check_follows() -> None:
    with pytest.raises(UserError, match="at least 1"):
        Example(rank=0)


def test_settings_are_values() -> None:
    assert Example(rank=3) == Example(rank=3) != Example(rank=4)
    assert hash(Example(rank=3)) == hash(Example(rank=3))
    with pytest.raises(FrozenInstanceError):
        Example().ratio = 1.0  # type: ignore[misc]
