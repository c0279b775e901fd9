"""Measure the seconds and peak memory of each phase of a run."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Timed:
    """Measure a block: ``with Timed() as spent``. Wall seconds, and CPU seconds summed over all threads."""

    seconds = cpu_seconds = 0.0

    def __enter__(self) -> "Timed":
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        wall, cpu = self._began
        self.seconds = round(time.perf_counter() - wall, 3)
        self.cpu_seconds = round(time.process_time() - cpu, 3)


class Phases(dict[str, dict[str, float]]):
    """Map a phase name to ``{"seconds": …, "cpu_seconds": …, "peak_mib": …, "added_mib": …}``.

    ``seconds`` is wall time; ``cpu_seconds`` is CPU time summed over all threads. ``peak_mib`` is the peak resident
    memory of the process; ``added_mib`` is the peak minus the resident memory at the start of the phase.
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
    """Reset the kernel's peak counter. A no-op outside Linux, where the peak covers the whole process so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _mib(which: str) -> float:
    """Return the current (VmRSS) or peak (VmHWM) resident memory in MiB; outside Linux always the peak."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split(f"{which}:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def duration(seconds: float, decimals: int = 0) -> str:
    """Return a length of time in the unit that suits it. ``decimals``: of seconds."""
    if seconds < 90:
        return f"{seconds:.{decimals}f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
