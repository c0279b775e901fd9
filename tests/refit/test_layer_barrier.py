"""Functions that run in step: nobody goes on before all are there, and none is left behind."""

import _thread
import signal
import threading
import time
from functools import partial

import pytest
import torch
from threadpoolctl import threadpool_info

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


@pytest.mark.parametrize("threads", [1, 3])
def test_each_computes_with_the_threads_of_the_caller(threads: int) -> None:
    """OpenMP has a number of threads for each thread of the process, and sums are rounded otherwise with another."""
    before, seen = torch.get_num_threads(), list[int]()

    def width() -> None:
        pools = [pool for pool in threadpool_info() if pool["user_api"] == "openmp" and "torch" in pool["filepath"]]
        seen.extend(pool["num_threads"] for pool in pools)

    torch.set_num_threads(threads)
    try:
        Lockstep(lambda station: None).run([width, width])
    finally:
        torch.set_num_threads(before)
    assert seen and set(seen) == {threads}
