"""Provenance of a run: command, commit, digests of data, checkpoint and lock file, versions, and machine."""

import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from spectrim.tools import digests


def _checkout() -> Path:
    """Return the root of the checkout that holds this code, or else the folder of the installed package.

    Both hold ``experiments`` and ``results/index``. An installed package may lie in a project of someone else, whose
    commit and lock file say nothing of it.
    """
    above = Path(__file__).resolve().parents[3] / "pyproject.toml"
    ours = above.is_file() and 'name = "spectrim"' in above.read_text(encoding="utf-8").splitlines()
    return above.parent if ours else Path(__file__).resolve().parents[1]


ROOT = _checkout()
LOCK = ROOT / "requirements.lock"
PACKAGES = (
    "spectrim",
    "torch",
    "torchvision",
    "numpy",
    "hydra-core",
    "omegaconf",
    "safetensors",
    "transformers",
    "pandas",
    "matplotlib",
)
UNKNOWN = "unknown"


def provenance(command: str, data_digest: str, checkpoint_digest: str | None, device: str = "cpu") -> dict[str, Any]:
    """Return the provenance of a run at this moment.

    ``checkpoint_digest``: sha256 of the file of the initial weights; None if they come from no file.
    ``device``: the device in use.
    """
    commit, dirty = git_state()
    return {
        "command": command,
        "commit": commit,
        "dirty": dirty,
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "data_digest": data_digest,
        "checkpoint_digest": checkpoint_digest,
        "lock_digest": lock_digest(),
        "versions": versions(),
        "machine": machine(),
        "device": device,
    }


def lock_digest() -> str:
    """Return the sha256 of the checkout's lock file, or "unknown" for an installed package, which has none."""
    return digests.of_file(LOCK) if LOCK.is_file() else UNKNOWN


def git_state(root: Path = ROOT) -> tuple[str, bool]:
    """Return the commit of the checkout that holds this code, and whether tracked files differ from it.

    Outside a checkout the result is ("unknown", False). Only a ``.git`` at ``root`` itself counts, so a virtual
    environment inside another repository never reports that repository's commit.
    """
    if not (root / ".git").exists():
        return UNKNOWN, False
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return (commit, bool(changes)) if commit else (UNKNOWN, False)


def _output(*command: str) -> str:
    """Return the output of a command, or an empty string if it is missing, fails or hangs."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (subprocess.SubprocessError, OSError):
        return ""
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed ``PACKAGES``, without importing them."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Return the hardware: system, processor, usable cores, memory in MiB, and GPU names (empty without GPUs)."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": _cores(),
        "memory_mib": _memory_mib(),
        "gpus": _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines(),
    }


def _processor() -> str:
    # platform.processor() is empty on most Linux systems.
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or UNKNOWN


def _cores() -> int | None:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows
        return os.cpu_count()


def _memory_mib() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    except (ValueError, OSError, AttributeError):
        return None
