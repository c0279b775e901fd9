"""Where a run is followed while it happens: nowhere, or Weights & Biases. Tracking never stops or fails a run.

Tables and figures are made of our own records alone, so whatever is lost here is lost to the dashboard only.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from spectrim.tools.settings import settings

if TYPE_CHECKING:
    import pandas as pd

# Seconds to wait for the server, at the start and at the end of a run. Past that the run goes on without it.
PATIENCE = 15.0


class Handle(Protocol):
    """What a run is told while it happens."""

    delivered: bool
    """Once the run is over: whether somebody was told all of it."""

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Numbers of one step, drawn against the step and, where one of them is ``rank``, against the rank too.

        A text under ``layer`` gives that layer a curve of its own; numbers by name, such as the rank of every layer,
        give one a name; other texts are not drawn.
        """

    def table(self, name: str, frame: "pd.DataFrame") -> None:
        """A table, such as the rank of every layer."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """What is left to say when the run is over: one value a name."""


class Silent:
    """A handle that tells nobody."""

    delivered = False

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Nothing."""

    def table(self, name: str, frame: "pd.DataFrame") -> None:
        """Nothing."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Nothing."""


@settings
class NoTracking:
    """No tracking; needs no package and no network."""

    @contextmanager
    def run(self, signature: str, group: str, job_type: str, config: Mapping[str, Any]) -> Iterator[Handle]:
        """A run that nobody follows."""
        yield Silent()


@settings
class WandB:
    """Weights & Biases.

    ``mode`` "offline" writes below ``dir``/wandb without any network, to be sent later by ``wandb sync``; "online"
    sends to the server that ``wandb login`` chose. A package, a login or a server that is missing costs one line of
    warning, and the rest of the process is not tracked.
    """

    project: str = "spectrim"
    mode: Literal["offline", "online"] = "offline"
    entity: str | None = None
    dir: str = "build"

    @contextmanager
    def run(self, signature: str, group: str, job_type: str, config: Mapping[str, Any]) -> Iterator[Handle]:
        """Follow one run, known by its ``signature``: the same run again adds to what is there.

        ``group``: the table or figure it belongs to; ``job_type``: the algorithm; ``config``: the resolved settings.
        """
        handle = _Followed(self, signature, group, job_type, config)
        failed = True
        try:
            yield handle
            failed = False
        finally:
            handle.finish(exit_code=int(failed))

    def start(self, signature: str, group: str, job_type: str, config: Mapping[str, Any]) -> Any:
        """The run as W&B gives it. Raises whatever W&B raises."""
        # Read when wandb is imported: error reports look up a host name, also in offline mode.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        Path(self.dir).mkdir(parents=True, exist_ok=True)
        wandb.setup(wandb.Settings(silent=True))
        # Asked without a prompt, which would wait for a person.
        if self.mode == "online" and not wandb.login(prompt=False, verify=False):
            raise PermissionError("nobody is logged in; do so with `wandb login`, or set tracking.mode=offline")
        return wandb.init(
            project=self.project,
            entity=self.entity,
            mode=self.mode,
            dir=self.dir,
            id=signature,
            name=f"{job_type}-{signature[:6]}",
            group=group,
            job_type=job_type,
            resume="allow",
            config=dict(config),
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,  # the record holds the commit; a dirty tree's diff is nobody's business
                init_timeout=PATIENCE,
                finish_timeout=PATIENCE,
                finish_timeout_raises=True,
            ),
        )


class _Followed:
    """A handle on a W&B run; from its first failure on it does nothing."""

    # Of the process, not of one run: a grid waits for a server that is away once, not at every run.
    given_up = False

    def __init__(self, tracker: WandB, signature: str, group: str, job_type: str, config: Mapping[str, Any]) -> None:
        self.run: Any = None
        self.delivered = False
        self.defined: set[str] = set()
        if _Followed.given_up:
            return
        with self._at_no_risk():
            self.run = tracker.start(signature, group, job_type, config)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        layer = metrics.get("layer")
        numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        named = {
            f"{key}/{name}": number
            for key, value in metrics.items()
            if isinstance(value, Mapping)
            for name, number in value.items()
        }
        axes = dict.fromkeys(numbers | named, "step")
        payload = numbers | named | {"step": step}
        if "rank" in numbers:
            curve = "against rank" if layer is None else f"against rank/{layer}"
            against = {f"{curve}/{key}": value for key, value in numbers.items() if key != "rank"}
            axes |= dict.fromkeys(against, "rank")
            payload |= against
        with self._at_no_risk():
            if self.run:
                # Undefined, W&B draws a metric against its own count of calls.
                for key in sorted(axes.keys() - self.defined):
                    self.run.define_metric(key, step_metric=axes[key])
                self.defined |= axes.keys()
                self.run.log(payload)

    def table(self, name: str, frame: "pd.DataFrame") -> None:
        with self._at_no_risk():
            if self.run:
                import wandb

                # Objects, so that a missing rank is None and not a NaN in a column of numbers.
                rows = frame.astype(object).where(frame.notna(), None).to_numpy()
                self.run.log({name: wandb.Table(columns=[str(column) for column in frame.columns], data=rows)})

    def summary(self, values: Mapping[str, Any]) -> None:
        with self._at_no_risk():
            if self.run:
                self.run.summary.update(dict(values))

    def finish(self, exit_code: int) -> None:
        """Hand over what is left, waiting for the server no longer than ``PATIENCE``."""
        with self._at_no_risk():
            if self.run:
                self.run.finish(exit_code=exit_code)
                self.delivered = exit_code == 0

    @contextmanager
    def _at_no_risk(self) -> Iterator[None]:
        # Every Exception, whatever it is: W&B raises its own, the network's, the disk's and its service's.
        try:
            yield
        except Exception as error:
            self.run = None
            _Followed.given_up = True
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"spectrim: warning: W&B tracking is off from here on: {reason}", file=sys.stderr)
