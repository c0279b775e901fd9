"""Tune glibc malloc. A no-op on other C libraries."""

import ctypes
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # from mallopt(3)
_LARGEST = 32 * 2**20  # bytes, the maximum that mallopt accepts


def _glibc(function: str) -> Any:
    return getattr(ctypes.CDLL(None), function, None)


def keep() -> None:
    """Reuse freed memory, except blocks above 32 MiB.

    By default glibc maps each large tensor anew in every batch, and the kernel clears its pages. For a small network on
    a CPU this takes a third of the time, and more if several processes run.
    """
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, -1)  # never


def give_back() -> None:
    """Return freed memory to the system; malloc may hold as much as the model's own size."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)
