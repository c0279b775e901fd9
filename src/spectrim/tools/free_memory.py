"""The memory that this process can still take: what the machine has free, or less where a container sets a limit."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

GB = 1e9
# Of a control group: its limit, what it uses, and the cached files within that, which the system gives up.
VERSION_1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
VERSION_2 = "memory.max", "memory.current", "inactive_file"


def free_memory(root: Path = Path("/")) -> int:
    """Return the bytes that are free now; outside of Linux, all that the machine has.

    ``root``: the folder with ``proc`` and ``sys``.
    """
    found = list(_of_groups(root))
    with suppress(OSError, StopIteration):
        lines = (root / "proc/meminfo").read_text().splitlines()
        found.append(1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")))
    return min(found) if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def in_gb(count: float) -> str:
    """Return a number of bytes as text."""
    return f"{count / GB:.3g} GB"


def _of_groups(root: Path) -> Iterator[int]:
    """Yield what the limit of each control group leaves that this process belongs to, and of each above it."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds and "memory" not in kinds.split(","):
                continue
            top = root / "sys/fs/cgroup" / ("memory" if kinds else "")
            own = top / path.strip("/")
            for folder in (own, *own.parents):
                with suppress(OSError, ValueError):  # not mounted here, or "max": no limit
                    yield _left(folder, *(VERSION_1 if kinds else VERSION_2))
                if folder == top:
                    break


def _left(folder: Path, limit: str, usage: str, cached: str) -> int:
    most, used = (int((folder / name).read_text()) for name in (limit, usage))
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return max(0, most - used + int(stat.get(cached, 0)))
