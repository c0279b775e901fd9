"""Free memory is that of the machine, or what a limit of a container leaves."""

from pathlib import Path

import pytest

from spectrim.tools.free_memory import free_memory, in_gb

MACHINE = {"proc/meminfo": "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 8000 kB\n"}
NEW = {"proc/self/cgroup": "0::/jobs/one\n"}
OLD = {"proc/self/cgroup": "5:cpu:/\n4:name=memory:/\n3:memory,hugetlb:/jobs/one\n0::/\n"}


def limit(folder: str, most: object, used: int, cached: int = 0, old: bool = False) -> dict[str, str]:
    names = ("limit_in_bytes", "usage_in_bytes", "total_inactive_file") if old else ("max", "current", "inactive_file")
    folder = f"sys/fs/cgroup/{folder}"
    return {
        f"{folder}/memory.{names[0]}": f"{most}\n",
        f"{folder}/memory.{names[1]}": f"{used}\n",
        f"{folder}/memory.stat": f"anon 7\n{names[2]} {cached}\n",
    }


@pytest.mark.parametrize(
    ("files", "free"),
    [
        (MACHINE, 8_192_000),
        (MACHINE | NEW | limit("jobs/one", 5_000_000, 4_000_000), 1_000_000),
        (MACHINE | NEW | limit("jobs/one", 5_000_000, 4_000_000, cached=500_000), 1_500_000),
        (MACHINE | NEW | limit("jobs/one", "max", 4_000_000), 8_192_000),
        (MACHINE | NEW | limit("jobs/one", "max", 0) | limit("jobs", 3_000_000, 1_000_000), 2_000_000),
        (MACHINE | NEW | limit("", 3_000_000, 1_000_000), 2_000_000),
        (MACHINE | NEW | limit("jobs/one", 5_000_000, 6_000_000), 0),
        (MACHINE | OLD | limit("memory/jobs/one", 2**63 - 4096, 4_000_000, old=True), 8_192_000),
        (MACHINE | OLD | limit("memory/jobs", 5_000_000, 4_000_000, old=True), 1_000_000),
        (MACHINE | OLD | limit("jobs/one", 5_000_000, 4_000_000), 8_192_000),
        (NEW | limit("jobs/one", 5_000_000, 4_000_000), 1_000_000),
    ],
)
def test_the_least_of_machine_and_limits_counts(files: dict[str, str], free: int, tmp_path: Path) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert free_memory(tmp_path) == free


def test_this_machine_has_some(tmp_path: Path) -> None:
    assert 2**20 < free_memory() <= free_memory(tmp_path)  # without any file: all that the machine has


def test_bytes_read_as_text() -> None:
    assert in_gb(12_345_678_901) == "12.3 GB" and in_gb(5_000_000) == "0.005 GB"
