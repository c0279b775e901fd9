"""Tracking by TensorBoard."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from spectrim.runs.tracking.session import About, Results
from spectrim.tools import extras
from spectrim.tools.settings import settings


@settings
class TensorBoard:
    """Tracking in event files below ``dir``, for ``tensorboard --logdir`` to show."""

    label: ClassVar[str] = "TensorBoard"
    dir: str = "build/tensorboard"

    def start(self, about: About) -> "TensorBoardRun":
        """Begin an event file, in a folder that the name of the run names."""
        extras.imported("tensorboard", "tensorboard", "tracking=tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        run = TensorBoardRun(SummaryWriter(str(Path(self.dir) / about.group / about.name)))
        run.text("settings", json.dumps({**vars(about)}, indent=1, default=str))
        return run


class TensorBoardRun:
    """The event file of one run."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def text(self, name: str, content: str) -> None:
        """Report a text in a fixed-width font."""
        self.writer.add_text(name, "".join(f"    {line}\n" for line in content.splitlines()))

    def log(self, numbers: Mapping[str, float], axis: str) -> None:
        for name, value in numbers.items():
            if name != axis:
                self.writer.add_scalar(name, value, round(numbers[axis]))

    def finish(self, results: Results | None, status: int) -> None:
        if results:
            for name, value in results.summary.items():
                if isinstance(value, int | float):
                    self.writer.add_scalar(f"summary/{name}", value)
                else:
                    self.text(f"summary/{name}", str(value))
            for name, frame in results.tables.items():
                self.writer.add_text(name, frame.to_markdown(index=False))
            for name, content in results.files.items():
                self.text(name, content.decode())
        self.text("status", "finished" if status == 0 else f"failed with status {status}")
        self.writer.close()
