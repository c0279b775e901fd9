"""Functions that run in step: nobody goes on before all are there, and none is left behind."""

import _thread
import signal
import threading
import time
from functools import partial

import pytest

from spectrim.refit.layer_barrier import Lockstep


def test_nobody_goes_on_before_all_are_there() -> None:
    said: list[str] = []
    steps = Lockstep(lambda station: said.append(f"all at {station}"))

    def walk(name: str) -> None:
        for part in ("a", "b", "c"):
            said.append(part)
            if part != "c":
                steps.station()

    steps.run([lambda name=name: walk(name) for name in "xyz"])  # type: ignore[misc]
    assert said == [*"aaa", "all at 0", *"bbb", "all at 1", *"ccc"]


def test_only_one_runs_at_a_time() -> None:
    running, most = 0, 0
    steps = Lockstep(lambda station: None)

    def work() -> None:
        nonlocal running, most
        for _ in range(3):
            running += 1
            most = max(most, running)
            sum(range(20_000))
            running -= 1
            steps.station()

    steps.run([work] * 5)
    assert most == 1


@pytest.mark.parametrize("where", ["a function", "the meeting", "one that ends early and says so"])
def test_the_first_error_ends_all(where: str) -> None:
    before = threading.active_count()
    after: list[int] = []

    def met(station: int) -> None:
        if where == "the meeting":
            raise ValueError(where)

    steps = Lockstep(met)

    def work(index: int) -> None:
        if index == 1 and where != "the meeting":
            raise ValueError(where)
        steps.station()
        after.append(index)

    with pytest.raises(ValueError, match=where):
        steps.run([lambda index=index: work(index) for index in range(4)])  # type: ignore[misc]
    assert not after and threading.active_count() == before


def test_of_nothing_nothing_is_run() -> None:
    Lockstep(lambda station: pytest.fail()).run([])


def test_after_an_interruption_no_thread_is_left() -> None:
    before = threading.active_count()
    steps = Lockstep(lambda station: None)

    def work(first: bool) -> None:
        if first:
            _thread.interrupt_main()
        for _ in range(1000):
            time.sleep(0.01)
            steps.station()

    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is born ignoring it
    try:
        with pytest.raises(KeyboardInterrupt):
            steps.run([partial(work, index == 0) for index in range(3)])
    finally:
        signal.signal(signal.SIGINT, usual)
    assert threading.active_count() == before
