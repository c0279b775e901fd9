"""What the C library does with memory that is freed. Elsewhere than with glibc: what it always does."""

import ctypes
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGEST = 32 * 2**20  # bytes, the most that mallopt takes


def _glibc(function: str) -> Any:
    return getattr(ctypes.CDLL(None), function, None)


def keep() -> None:
    """Keep what is freed for the next use, but for blocks above 32 MiB.

    By default each large tensor is mapped anew and its pages are cleared by the kernel, batch after batch: of a small
    net on a processor a third of the time, and more where several processes do so.
    """
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, -1)  # never


def give_back() -> None:
    """Return to the system what was freed and kept, up to the size of the model again."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)
