"""Seconds and peak memory of each phase of a run."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Timed:
    """``with Timed() as spent``: seconds of the block on the wall, and of the CPU, of all threads together."""

    seconds = cpu_seconds = 0.0

    def __enter__(self) -> "Timed":
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        wall, cpu = self._began
        self.seconds = round(time.perf_counter() - wall, 3)
        self.cpu_seconds = round(time.process_time() - cpu, 3)


class Phases(dict[str, dict[str, float]]):
    """Phase name to ``{"seconds": …, "cpu_seconds": …, "peak_mib": …, "added_mib": …}``.

    Seconds are those on the wall; of the CPU, of all threads together. The peak is of the whole process's resident
    memory; added is by how much it lies above what lay there before.
    """

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measure the block as phase ``name``."""
        _reset_peak()
        before, spent = _mib("VmRSS"), Timed()
        try:
            with spent:
                yield
        finally:
            peak = _mib("VmHWM")
            self[name] = {
                "seconds": spent.seconds,
                "cpu_seconds": spent.cpu_seconds,
                "peak_mib": round(peak, 1),
                "added_mib": round(max(0.0, peak - before), 1),
            }


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
