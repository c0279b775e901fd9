"""A plan is a value: it compares, hashes, and goes through JSON unchanged."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrim.errors import UserError
from spectrim.factored.forms import EmbeddingForm, PlainForm, TuckerForm
from spectrim.factored.plan import Kept, RankPlan

FORMS = [PlainForm("linear"), PlainForm("channel", 4), EmbeddingForm(3), TuckerForm(2, 5)]
keeps = st.integers(1, 99) | st.lists(st.integers(0, 99), min_size=1, max_size=5, unique=True).map(tuple)
plans = st.dictionaries(st.text(), st.builds(Kept, keeps, st.sampled_from(FORMS)))


@given(plans)
def test_json_gives_the_plan_back(kept: dict[str, Kept]) -> None:
    plan = RankPlan.of(kept)
    assert RankPlan.from_json(plan.to_json()) == plan
    assert dict(plan) == kept


@given(plans)
def test_order_does_not_matter(kept: dict[str, Kept]) -> None:
    plan, turned = RankPlan.of(kept), RankPlan.of(dict(reversed(kept.items())))
    assert plan == turned and hash(plan) == hash(turned) and plan.to_json() == turned.to_json()


def test_a_plan_reads_as_a_mapping() -> None:
    plan = RankPlan.of({"b": Kept(3, PlainForm("linear")), "a": Kept((0, 4), PlainForm("channel"))})
    assert list(plan) == ["a", "b"] and len(plan) == 2 and "b" in plan and "c" not in plan
    assert plan["a"].rank == 2 and plan["b"].rank == 3
    assert plan.as_dict() == {"a": {"components": [0, 4], "form": "channel"}, "b": {"rank": 3, "form": "linear"}}
    assert not RankPlan()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "null",
        '{"fc": 3}',
        '{"fc": {"rank": 3}}',
        '{"fc": {"rank": 0, "form": "linear"}}',
        '{"fc": {"rank": 1e400, "form": "linear"}}',
        "[" * 100_000,
        '{"fc": {"rank": -2, "form": "linear"}}',
        '{"fc": {"rank": "many", "form": "linear"}}',
        '{"fc": {"components": [], "form": "linear"}}',
        '{"fc": {"form": "linear"}}',
        '{"fc": {"rank": 3, "form": "nonsense"}}',
        '{"fc": {"rank": 3, "form": "tucker 2x' + "9" * 5000 + '"}}',
        '{"fc": {"rank": 3, "form": 3}}',
        '{"fc": {"rank": ' + "9" * 5000 + ', "form": "linear"}}',
        '{"fc": {"rank": 2.5, "form": "linear"}}',
        '{"fc": {"rank": true, "form": "linear"}}',
        '{"fc": {"components": "12", "form": "linear"}}',
        '{"fc": {"components": [1, 1], "form": "linear"}}',
        '{"fc": {"components": [-1], "form": "linear"}}',
    ],
)
def test_what_is_not_a_plan_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="not a rank plan") as refusal:
        RankPlan.from_json(text)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 250
