"""Seconds and peak memory of each phase of a run."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Phases(dict[str, dict[str, float]]):
    """Phase name to ``{"seconds": …, "peak_mib": …}``; the peak is of the whole process's resident memory."""

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measure the block as phase ``name``."""
        _reset_peak()
        started = time.perf_counter()
        try:
            yield
        finally:
            self[name] = {"seconds": round(time.perf_counter() - started, 3), "peak_mib": round(_peak_mib(), 1)}


def _reset_peak() -> None:
    """Let the kernel start the peak anew; elsewhere than on Linux the peak is that of the process so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_mib() -> float:
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
