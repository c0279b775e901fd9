"""Settings are frozen, and a value of the wrong type is refused in one line."""

from collections.abc import Sequence
from dataclasses import FrozenInstanceError, asdict
from typing import Any, Literal

import pytest

from spectrim.errors import UserError
from spectrim.tools.settings import require_parts, settings


@settings
class Example:
    """One field of each kind that the package uses."""

    rank: int | None = None
    ratio: float = 0.5
    view: Literal["channel", "spatial"] = "channel"
    errors: float | Literal["auto"] | None = None
    flag: bool = False
    ratios: Sequence[float] = (0.5,)
    sizes: Sequence[Sequence[float]] = ()

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:  # may rely on the type: the check of types comes first
            raise UserError("rank must be at least 1")


@pytest.mark.parametrize(
    "good",
    [
        {},
        {"rank": 3},
        {"ratio": 1},
        {"view": "spatial"},
        {"flag": True},
        {"ratios": [0.1, 1]},
        {"ratios": ()},
        {"sizes": [[0.3, 16], (0.3, 24)]},
    ],
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
        {"rank": True},
        {"ratio": True},
        {"ratios": [True]},
        {"ratios": [*[0.5] * 99, False]},  # however long, every item is looked at
        {"sizes": [[0.3, 16], [0.3, True]]},
        {"sizes": [[0.3, 16], 0.3]},
    ],
)
def test_values_of_another_type_are_refused_in_one_line(bad: dict[str, Any]) -> None:
    ((name, value),) = bad.items()
    with pytest.raises(UserError) as refusal:
        Example(**bad)
    assert str(refusal.value).startswith(f"Example: {name}={value!r} is no")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"rank": "abc"}, "Example: rank='abc' is none of: int, None"),
        ({"errors": "automatic"}, "Example: errors='automatic' is none of: float, 'auto', None"),
        ({"view": "diagonal"}, "Example: view='diagonal' is none of: 'channel', 'spatial'"),
        ({"ratio": "0.5"}, "Example: ratio='0.5' is not of type float"),
        ({"ratios": 0.5}, "Example: ratios=0.5 is not of type Sequence[float]"),
    ],
)
def test_a_refusal_lists_what_a_setting_may_be(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refusal:
        Example(**bad)
    assert str(refusal.value) == message


def test_a_value_of_several_lines_is_shown_in_one() -> None:
    with pytest.raises(UserError, match=r"^Example: ratio=array\(\[0, 1\], \[2, 3\]\) is not of type float$"):
        Example(ratio=Lines())  # type: ignore[arg-type]


class Lines:
    """Is written in two lines, as an array is."""

    def __repr__(self) -> str:
        return "array([0, 1],\n      [2, 3])"


def test_the_own_check_follows() -> None:
    with pytest.raises(UserError, match="at least 1"):
        Example(rank=0)


@settings
class Heir(Example):
    """Takes fields and checks from its parent, whose class it is not."""

    more: int = 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [({"rank": 0}, "^rank must be at least 1$"), ({"flag": 1}, "^Heir: flag=1"), ({"more": True}, "^Heir: more=True")],
)
def test_an_heir_checks_its_own_fields_and_those_of_its_parent(bad: dict[str, Any], message: str) -> None:
    assert asdict(Heir(rank=2, more=1)) == asdict(Example(rank=2)) | {"more": 1}
    with pytest.raises(UserError, match=message):
        Heir(**bad)


def test_settings_are_values() -> None:
    assert Example(rank=3) == Example(rank=3) != Example(rank=4)
    assert hash(Example(rank=3)) == hash(Example(rank=3))
    with pytest.raises(FrozenInstanceError):
        Example().ratio = 1.0  # type: ignore[misc]


@settings
class Seeded:
    """A seed, and a number of another name."""

    seed: int = 0
    seeds: int = 0


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64, 10**30])
def test_a_seed_that_some_generator_does_not_take_is_refused(seed: int) -> None:
    assert Seeded(seed=2**32 - 1, seeds=seed)
    with pytest.raises(UserError, match=f"^Seeded: seed={seed} is not a whole number in 0..4294967295$"):
        Seeded(seed=seed)


@pytest.mark.parametrize("parts", [[], [0.0], [0.5, 1.0], [float("nan")], [-0.1, 0.2]], ids=str)
def test_parts_outside_of_the_open_interval_are_refused_by_their_name(parts: list[float]) -> None:
    require_parts("ratios", (0.1, 0.9))
    with pytest.raises(UserError, match=r"^ratios must lie in \(0, 1\), got \["):
        require_parts("ratios", parts)
