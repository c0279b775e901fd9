"""Follow one run with a tracker. What the tracker does, or fails to do, never stops or fails the run."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from spectrim.runs.tracking.session import About, Results, Session, Tracker

# Trackers that failed in this process, by label: a grid waits only once for a server that does not answer.
GIVEN_UP: set[str] = set()
# Seconds between two reports of one progress bar that holds no numbers.
EVERY = 5.0


class Followed:
    """A run and its tracker. After the first failure of the tracker it does nothing."""

    def __init__(self, tracker: Tracker, about: About) -> None:
        self._label = tracker.label
        self._session: Session | None = None
        self._told: dict[str, float] = {}
        if self._label not in GIVEN_UP:
            with self._at_no_risk():
                self._session = tracker.start(about)

    def progress(self, stage: str, done: float, total: float | None, numbers: Mapping[str, float]) -> None:
        """Report how far a stage is, such as the epochs of a training, while the run goes on."""
        now = time.monotonic()
        if not numbers and done != total and now - self._told.get(stage, -EVERY) < EVERY:
            return
        self._told[stage] = now
        share = {"share": done / total} if total else {}
        said = {"done": float(done), **share, **numbers}
        self._log({f"progress/{stage}/{name}": value for name, value in said.items()}, f"progress/{stage}/done")

    def finish(self, results: Results | None, status: int = 0) -> bool:
        """Report the results, and end the run. Return whether all of it was delivered.

        ``results``: None for a run that failed.
        """
        for step, entry in enumerate(results.log if results else ()):
            self._log_entry(entry, step)
        with self._at_no_risk():
            if self._session:
                self._session.finish(results, status)
                return True
        return False

    def _log_entry(self, entry: Mapping[str, Any], step: int) -> None:
        """Report one step of the log of a record.

        If ``rank`` is among its numbers, they are also plotted against it, with a curve for each text under ``layer``.
        A mapping of names to numbers gives a curve for each name.
        """
        numbers = {key: float(value) for key, value in entry.items() if isinstance(value, int | float)}
        named = {
            f"{key}/{name}": float(number)
            for key, value in entry.items()
            if isinstance(value, Mapping)
            for name, number in value.items()
            if isinstance(number, int | float)
        }
        self._log({**numbers, **named, "step": float(step)}, "step")
        if "rank" in numbers:
            curve = "against rank" if entry.get("layer") is None else f"against rank/{entry['layer']}"
            against = {f"{curve}/{key}": value for key, value in numbers.items() if key != "rank"}
            self._log({**against, f"{curve}/rank": numbers["rank"]}, f"{curve}/rank")

    def _log(self, numbers: Mapping[str, float], axis: str) -> None:
        with self._at_no_risk():
            if self._session:
                self._session.log(numbers, axis)

    @contextmanager
    def _at_no_risk(self) -> Iterator[None]:
        # Catch every exception: those of the tracker, its service, the network and the disk.
        try:
            yield
        except Exception as error:
            self._session = None
            GIVEN_UP.add(self._label)
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"spectrim: warning: {self._label} tracking is off from here on: {reason}", file=sys.stderr)
