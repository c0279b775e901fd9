"""Tracking in plain csv files, without a package and without a server."""

import csv
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from spectrim.runs.tracking.session import About, Results
from spectrim.tools.settings import settings


@settings
class Csv:
    """Tracking in a folder for each run, ``dir``/SIGNATURE.

    ``log.csv`` grows while the run goes on. ``run.json`` holds settings and status, ``summary.csv`` the final values.
    Each table and file of the results lies beside them.
    """

    label: ClassVar[str] = "csv"
    dir: str = "build/tracking"

    def start(self, about: About) -> "CsvRun":
        """Begin a folder. A run that is told again replaces the files of the earlier one."""
        return CsvRun(Path(self.dir) / about.signature, about)


class CsvRun:
    """The folder of one run."""

    def __init__(self, folder: Path, about: About) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.about = folder, about
        self._state("running")
        self.file = (folder / "log.csv").open("w", newline="", encoding="utf-8")
        self.rows = csv.writer(self.file)
        self.rows.writerow(["time", "axis", "at", "name", "value"])

    def _state(self, status: str) -> None:
        told = {**vars(self.about), "status": status}
        (self.folder / "run.json").write_text(json.dumps(told, indent=1, default=str) + "\n", encoding="utf-8")

    def log(self, numbers: Mapping[str, float], axis: str) -> None:
        now = round(time.time(), 3)
        self.rows.writerows([now, axis, numbers[axis], name, value] for name, value in numbers.items() if name != axis)
        self.file.flush()  # so that it can be read while the run goes on

    def finish(self, results: Results | None, status: int) -> None:
        self.file.close()
        if results:
            with (self.folder / "summary.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("name", "value"), *results.summary.items()])
            for name, frame in results.tables.items():
                frame.to_csv(self.folder / f"{name}.csv", index=False)
            for name, content in results.files.items():
                (self.folder / name).write_bytes(content)
        self._state("finished" if status == 0 else f"failed with status {status}")
