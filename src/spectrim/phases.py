"""Seconds and peak memory of each phase of a run."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Phases(dict[str, dict[str, float]]):
    """Phase name to ``{"seconds": …, "peak_mib": …, "added_mib": …}``.

    The peak is of the whole process's resident memory; added is by how much it lies above what lay there before.
    """

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measure the block as phase ``name``."""
        _reset_peak()
        before, started = _mib("VmRSS"), time.perf_counter()
        try:
            yield
        finally:
            seconds, peak = time.perf_counter() - started, _mib("VmHWM")
            added = max(0.0, peak - before)
            self[name] = {"seconds": round(seconds, 3), "peak_mib": round(peak, 1), "added_mib": round(added, 1)}


def _reset_peak() -> None:
    """Let the kernel start the peak anew; elsewhere than on Linux the peak is that of the process so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _mib(which: str) -> float:
    """Resident memory now (VmRSS) or at its peak (VmHWM); elsewhere than on Linux the peak for either."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split(f"{which}:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
