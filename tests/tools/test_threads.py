"""A thread that inherits computes as the one that starts it."""

from collections.abc import Callable
from contextvars import ContextVar
from threading import Thread
from typing import TypeVar

import pytest
import torch
from threadpoolctl import threadpool_info

from spectrim.tools.precision import settings_of_numbers, uncached
from spectrim.tools.threads import inheriting

T = TypeVar("T")
SCALE: ContextVar[float] = ContextVar("scale", default=1.0)


def elsewhere(see: Callable[[], T], as_here: bool = True) -> T:
    """What another thread sees."""
    seen: list[T] = []

    def run() -> None:
        seen.append(see())

    thread = Thread(target=inheriting(run) if as_here else run)
    thread.start()
    thread.join()
    return seen[0]


@pytest.mark.parametrize("threads", [1, 3])
def test_it_computes_with_the_threads_of_the_caller(threads: int) -> None:
    """OpenMP has a number of threads for each thread of the process, and sums are rounded otherwise with another."""

    def width() -> set[int]:
        pools = [pool for pool in threadpool_info() if pool["user_api"] == "openmp" and "torch" in pool["filepath"]]
        return {pool["num_threads"] for pool in pools}

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert elsewhere(width) == {threads}
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_its_cache_are_those_of_the_caller(dtype: torch.dtype) -> None:
    def see() -> tuple[list[str], torch.dtype, bool]:
        product = torch.ones(2, 2) @ torch.ones(2, 2)
        return settings_of_numbers(), product.dtype, torch.is_autocast_cache_enabled()

    with torch.autocast("cpu", dtype), uncached():
        assert elsewhere(see) == see() == ([f"autocast cpu {dtype}"], dtype, False)
        assert elsewhere(see, as_here=False) == ([], torch.float32, True)
        with torch.autocast("cpu", enabled=False):
            assert elsewhere(see) == see() == ([], torch.float32, False)


def test_context_variables_are_seen_and_what_is_set_there_stays_there() -> None:
    def change() -> float:
        before = SCALE.get()
        SCALE.set(7.0)
        return before

    token = SCALE.set(3.0)
    try:
        assert elsewhere(change) == 3.0 == SCALE.get()
        assert elsewhere(change, as_here=False) == 1.0
    finally:
        SCALE.reset(token)
