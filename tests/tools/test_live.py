"""Progress bars that a listener hears."""

from collections.abc import Mapping

import pytest

from spectrim.tools import live
from spectrim.tools.live import Bar

Heard = list[tuple[str, float, float | None, Mapping[str, float]]]


@pytest.fixture
def heard() -> Heard:
    return []


def test_a_listener_hears_each_step_though_no_bar_is_shown(heard: Heard, capsys: pytest.CaptureFixture[str]) -> None:
    with live.heard_by(lambda *step: heard.append(step)):
        for _ in Bar(range(2), "train"):
            pass
        with Bar(desc="refit", total=5) as bar:
            bar.update(3)
            bar.update(5 - bar.n)
    assert heard == [("train", 1, 2, {}), ("train", 2, 2, {}), ("refit", 3, 5, {}), ("refit", 5, 5, {})]
    assert capsys.readouterr() == ("", "")


def test_a_shown_bar_counts_no_step_twice(heard: Heard) -> None:
    with live.heard_by(lambda *step: heard.append(step)):
        for _ in Bar(range(3), "train", disable=False, initial=4, total=7, mininterval=0):
            pass
    assert [done for _, done, _, _ in heard] == [5, 6, 7]


def test_numbers_go_with_the_next_step_alone(heard: Heard) -> None:
    with live.heard_by(lambda *step: heard.append(step)):
        bar = Bar(range(2), "train")
        for epoch in bar:
            if not epoch:
                bar.tell({"loss": 0.5, "note": "text", "accuracy": None})
    assert [numbers for *_, numbers in heard] == [{"loss": 0.5}, {}]


def test_outside_the_block_and_without_a_name_nobody_hears(heard: Heard) -> None:
    with live.heard_by(lambda *step: heard.append(step)):
        for _ in Bar(range(2)):
            pass
    for _ in Bar(range(2), "train"):
        pass
    assert heard == []
