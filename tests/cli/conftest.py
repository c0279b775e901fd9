"""A grid of cells of a second each, for the tests of what runs a grid on several machines."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spectrim.records import records


@pytest.fixture(autouse=True)
def _no_handler_of_an_earlier_test() -> None:
    """Remove the handlers that Hydra has left at the root, whose streams ended with their test."""
    root = logging.getLogger()
    for handler in [own for own in root.handlers if type(own) is logging.StreamHandler]:
        root.removeHandler(handler)


class SmallGrid:
    """``ratios × seeds`` cells on the digits, whose records lie below ``folder``."""

    def __init__(self, folder: Path, ratios: int, seeds: int) -> None:
        self.folder, self.size = folder, ratios * seeds
        values = ",".join(f"{(number + 1) / (ratios + 1):.3f}" for number in range(ratios))
        swept = [f"algorithm.ratio={values}", f"data.calibration_seed={','.join(map(str, range(seeds)))}"]
        digits = ["data=digits", "model=mlp", "checkpoint=null", "algorithm=truncation", f"records={folder}"]
        self.command = [sys.executable, "-m", "spectrim.cli.run", "-m", *digits, *swept]

    def run(self, *more: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*self.command, *more], capture_output=True, text=True, timeout=1200, **options)

    def start(self, *more: str, **options: Any) -> subprocess.Popen[str]:
        piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([*self.command, *more], text=True, **piped, **options)

    def numbers(self) -> dict[str, Any]:
        """What a table is made of, by signature: all but times and provenance."""
        kept = ("names", "config", "dense", "compressed", "plan", "layers", "log")
        paths = [path for path in self.folder.glob("runs/*.json") if records.is_record(path)]
        read = [json.loads(path.read_text()) for path in paths]
        return {record["signature"]: {key: record[key] for key in kept} for record in read}

    def running(self) -> list[int]:
        """The processes that compute a cell."""
        notes = []
        for path in self.folder.glob("runs/.*.running"):
            try:
                notes.append(json.loads(path.read_text())["process"])
            except (OSError, ValueError):
                continue
        return notes

    def kill_one(self) -> bool:
        """Kill a process that computes a cell. Return whether there was one."""
        for process in self.running():
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:  # it has just ended
                continue
            return True
        return False


@pytest.fixture
def small_grid() -> type[SmallGrid]:
    """See ``SmallGrid``."""
    return SmallGrid


@pytest.fixture(scope="session")
def until() -> Callable[[Callable[[], Any], float], Any]:
    """``until(condition, seconds)``: wait until the condition holds, and return its value."""

    def waited(condition: Callable[[], Any], seconds: float) -> Any:
        end = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < end, f"still waiting after {seconds} s"
            time.sleep(0.05)
        return value

    return waited
