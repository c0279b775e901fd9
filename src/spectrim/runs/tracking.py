"""Report a run to a dashboard, Weights & Biases, or to nobody. Tracking never stops or fails a run.

Tables and figures are made from records only, so what gets lost here is missing on the dashboard only.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from spectrim.tools import extras
from spectrim.tools.settings import settings

if TYPE_CHECKING:
    import pandas as pd

# Seconds to wait for the server at the start and at the end of a run. After that the run continues without it.
PATIENCE = 15.0


class Handle(Protocol):
    """The receiver of a run's numbers."""

    delivered: bool
    """After the run: whether all of it was delivered."""

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Report the numbers of one step, which are plotted against the step.

        If ``rank`` is among them, they are also plotted against it, with a curve for each text under ``layer``. A
        mapping of names to numbers, such as the rank of every layer, gives a curve for each name. Other texts are not
        plotted.
        """

    def table(self, name: str, frame: "pd.DataFrame") -> None:
        """Report a table, such as the rank of every layer."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Report the final values of the run by name."""


class Silent:
    """A handle that reports to nobody."""

    delivered = False

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Do nothing."""

    def table(self, name: str, frame: "pd.DataFrame") -> None:
        """Do nothing."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Do nothing."""


@settings
class NoTracking:
    """No tracking. It needs no package and no network."""

    @contextmanager
    def run(self, signature: str, group: str, job_type: str, config: Mapping[str, Any]) -> Iterator[Handle]:
        """Yield a handle that reports to nobody."""
        yield Silent()


@settings
class WandB:
    """Tracking by Weights & Biases.

    If the package, the login or the server is missing, one warning is printed and the rest of the process is not
    tracked.

    ``mode``: "offline" writes below ``dir``/wandb without a network, for ``wandb sync`` to send later. "online" sends
    to the server that ``wandb login`` chose.
    """

    project: str = "spectrim"
    mode: Literal["offline", "online"] = "offline"
    entity: str | None = None
    dir: str = "build"

    @contextmanager
    def run(self, signature: str, group: str, job_type: str, config: Mapping[str, Any]) -> Iterator[Handle]:
        """Yield a handle for one run. A run with a known ``signature`` adds to the earlier one.

        ``group``: the table or figure to which it belongs.
        ``job_type``: the algorithm.
        ``config``: the resolved settings.
        """
        handle = _Followed(self, signature, group, job_type, config)
        failed = True
        try:
            yield handle
            failed = False
        finally:
            handle.finish(exit_code=int(failed))

    def start(self, signature: str, group: str, job_type: str, config: Mapping[str, Any]) -> Any:
        """Start a run of W&B and return it. Raises what W&B raises."""
        # wandb reads it when it is imported: error reports look up a host name, also in offline mode.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        extras.imported("wandb", "tracking", "tracking=wandb")
        import wandb

        Path(self.dir).mkdir(parents=True, exist_ok=True)
        wandb.setup(wandb.Settings(silent=True))
        # A prompt would wait for a person.
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
                disable_git=True,  # The record holds the commit, and a diff may hold private changes.
                init_timeout=PATIENCE,
                finish_timeout=PATIENCE,
                finish_timeout_raises=True,
            ),
        )


class _Followed:
    """A handle on a W&B run. After its first failure it does nothing."""

    # Shared by all runs of the process, so that a grid waits only once for a server that does not answer.
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
                # Without this W&B plots a metric against its own count of calls.
                for key in sorted(axes.keys() - self.defined):
                    self.run.define_metric(key, step_metric=axes[key])
                self.defined |= axes.keys()
                self.run.log(payload)

    def table(self, name: str, frame: "pd.DataFrame") -> None:
        with self._at_no_risk():
            if self.run:
                import wandb

                # Of type object, so that a missing rank is None instead of NaN.
                rows = frame.astype(object).where(frame.notna(), None).to_numpy()
                self.run.log({name: wandb.Table(columns=[str(column) for column in frame.columns], data=rows)})

    def summary(self, values: Mapping[str, Any]) -> None:
        with self._at_no_risk():
            if self.run:
                self.run.summary.update(dict(values))

    def finish(self, exit_code: int) -> None:
        """Deliver what is left. Wait for the server at most ``PATIENCE`` seconds."""
        with self._at_no_risk():
            if self.run:
                self.run.finish(exit_code=exit_code)
                self.delivered = exit_code == 0

    @contextmanager
    def _at_no_risk(self) -> Iterator[None]:
        # Catch every exception: those of W&B, its service, the network and the disk.
        try:
            yield
        except Exception as error:
            self.run = None
            _Followed.given_up = True
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"spectrim: warning: W&B tracking is off from here on: {reason}", file=sys.stderr)
