"""Following a run: what the tracker is told, and that nothing it does stops the run."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from spectrim.runs.tracking import followed
from spectrim.runs.tracking.followed import Followed
from spectrim.runs.tracking.session import About, Results

ABOUT = About("0123456789abcdef", "mlp-digits-lossless-012345", "table2", "lossless")


class Told:
    """A tracker and its session, which fails in the method that ``broken`` names."""

    label = "test"

    def __init__(self, broken: str = "", error: Exception | None = None) -> None:
        self.broken, self.error = broken, error or TimeoutError("no answer")
        self.logged: list[tuple[Mapping[str, float], str]] = []
        self.starts, self.ended = 0, None

    def _maybe_fail(self, method: str) -> None:
        if method == self.broken:
            raise self.error

    def start(self, about: About) -> Any:
        self.starts += 1
        self._maybe_fail("start")
        return self

    def log(self, numbers: Mapping[str, float], axis: str) -> None:
        self._maybe_fail("log")
        self.logged.append((numbers, axis))

    def finish(self, results: Results | None, status: int) -> None:
        self._maybe_fail("finish")
        self.ended = status


@pytest.fixture(autouse=True)
def _not_given_up() -> Iterator[None]:
    followed.GIVEN_UP.clear()
    yield
    followed.GIVEN_UP.clear()


def test_the_log_is_drawn_against_step_and_rank() -> None:
    told = Told()
    log = [
        {"layer": "conv1", "rank": 3, "measured": 0.5, "accepted": None},
        {"rank": 7, "ranks": {"conv1": 3, "fc": None}, "bisection": [{"delta": 0.5}]},
    ]
    assert Followed(told, ABOUT).finish(Results(log))
    assert told.logged == [
        ({"rank": 3, "measured": 0.5, "step": 0}, "step"),
        ({"against rank/conv1/measured": 0.5, "against rank/conv1/rank": 3}, "against rank/conv1/rank"),
        ({"rank": 7, "ranks/conv1": 3, "step": 1}, "step"),
        ({"against rank/rank": 7}, "against rank/rank"),
    ]
    assert told.ended == 0


def test_progress_is_told_against_what_is_done() -> None:
    told = Told()
    Followed(told, ABOUT).progress("train", 3, 12, {"loss": 0.5})
    names = {"progress/train/done": 3, "progress/train/share": 0.25, "progress/train/loss": 0.5}
    assert told.logged == [(names, "progress/train/done")]


def test_a_bar_without_numbers_is_told_every_few_seconds_and_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    told = Told()
    run = Followed(told, ABOUT)
    for done in range(1, 5):
        run.progress("refit", done, 8, {})
    now += followed.EVERY
    run.progress("refit", 5, 8, {})
    run.progress("refit", 6, 8, {})
    run.progress("refit", 8, 8, {})
    assert [numbers["progress/refit/done"] for numbers, _ in told.logged] == [1, 5, 8]


@pytest.mark.parametrize("error", [OSError("the server is away\nfor long"), RuntimeError()])
def test_a_failing_start_costs_one_line_in_a_process(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    told = Told("start", error)
    for _ in range(2):
        assert not Followed(told, ABOUT).finish(Results())
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("spectrim: warning: test tracking is off from here on: ")
    assert err.count("\n") == 1 and told.starts == 1


@pytest.mark.parametrize("broken", ["log", "finish"])
def test_a_failure_in_the_middle_or_at_the_end_costs_one_line(broken: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = Followed(Told(broken), ABOUT)
    run.progress("train", 1, 2, {})
    run.progress("train", 2, 2, {})
    assert not run.finish(Results())
    assert capsys.readouterr().err == "spectrim: warning: test tracking is off from here on: no answer\n"
