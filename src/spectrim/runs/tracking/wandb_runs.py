"""Tracking by Weights & Biases."""

import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal

from spectrim.runs.tracking.session import About, Results
from spectrim.tools import extras
from spectrim.tools.settings import settings

# Seconds to wait for the server at the start and at the end of a run. After that the run continues without it.
PATIENCE = 15.0
LONGEST_TAG = 64  # characters, a limit of W&B


@settings
class WandB:
    """Tracking by Weights & Biases.

    If the package, the login or the server is missing, one warning is printed and the rest of the process is not
    tracked.

    ``project`` and ``entity``: where the server keeps the runs. ``entity`` None: of the account that is logged in.
    ``mode``: "offline" writes below ``dir``/wandb without a network, for ``wandb sync`` to send later. "online" sends
    to the server that ``wandb login`` chose.
    """

    label: ClassVar[str] = "W&B"
    project: str = "spectrim"
    mode: Literal["offline", "online"] = "offline"
    entity: str | None = None
    dir: str = "build"

    def start(self, about: About) -> "WandBRun":
        """Begin a run of W&B. A run with a known signature adds to the earlier one."""
        # wandb reads it when it is imported: error reports look up a host name, also in offline mode.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        wandb = extras.imported("wandb", "tracking", "tracking=wandb")
        Path(self.dir).mkdir(parents=True, exist_ok=True)
        wandb.setup(wandb.Settings(silent=True))
        # A prompt would wait for a person.
        if self.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise PermissionError("nobody is logged in; do so with `wandb login`, or set tracking.mode=offline")
        run = wandb.init(
            project=self.project,
            entity=self.entity,
            mode=self.mode,
            dir=self.dir,
            id=None if "WANDB_SWEEP_ID" in os.environ else about.signature,  # an agent of a sweep gives one itself
            name=about.name,
            group=about.group,
            job_type=about.kind,
            tags=[tag[:LONGEST_TAG] for tag in dict.fromkeys(about.tags)],
            resume="allow",
            config=dict(about.settings),
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,  # The settings hold the commit, and a diff may hold private changes.
                init_timeout=PATIENCE,
                finish_timeout=PATIENCE,
                finish_timeout_raises=True,
            ),
        )
        return WandBRun(run, about.signature)


class WandBRun:
    """One run of W&B, which also measures the processor, the memory and the GPU."""

    def __init__(self, run: Any, signature: str) -> None:
        self.run, self.signature = run, signature
        self.defined: set[str] = set()

    def log(self, numbers: Mapping[str, float], axis: str) -> None:
        # Without this W&B plots a metric against its own count of calls.
        for name in sorted(numbers.keys() - self.defined - {axis}):
            self.run.define_metric(name, step_metric=axis)
        self.defined |= numbers.keys()
        self.run.log(dict(numbers))

    def finish(self, results: Results | None, status: int) -> None:
        """Wait for the server at most ``PATIENCE`` seconds."""
        if results:
            self._tell(results)
        self.run.finish(exit_code=status)

    def _tell(self, results: Results) -> None:
        import wandb

        for name, frame in results.tables.items():
            # Of type object, so that a missing rank is None instead of NaN.
            rows = frame.astype(object).where(frame.notna(), None).to_numpy()
            self.run.log({name: wandb.Table(columns=[str(column) for column in frame.columns], data=rows)})
        self.run.summary.update(dict(results.summary))
        artifact = wandb.Artifact(f"run-{self.signature}", "record")
        with TemporaryDirectory() as folder:
            for name, content in results.files.items():
                (Path(folder) / name).write_bytes(content)
                artifact.add_file(str(Path(folder) / name))  # copies it
        self.run.log_artifact(artifact)
