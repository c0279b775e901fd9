"""Let a tracker follow a run from its start to its end, and tell it once of a run that it has not followed."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from spectrim.cli.termination import ending
from spectrim.errors import UserError
from spectrim.runs import targets
from spectrim.runs.tracking.followed import Followed
from spectrim.runs.tracking.none import NoTracking
from spectrim.runs.tracking.session import About, Results, Tracker
from spectrim.tools import files, live


class Follower:
    """Tell a tracker of one run.

    ``place``: the settings of the tracker, such as mode, project and entity.
    ``result``: the record or the checkpoint of the run. A file beside it lists the places where all of the run was
        delivered. So a run that was told offline can still be told to a server.
    """

    def __init__(self, place: dict[str, Any], about: Callable[[], About], result: Path) -> None:
        self._tracker: Tracker | NoTracking = targets.build(place, "start")
        self._place, self._about, self._told = place, about, told_beside(result)
        self._followed: Followed | None = None

    @contextmanager
    def following(self) -> Iterator[None]:
        """Tell of the progress while the block runs. Where it fails, end the run with its exit status."""
        if isinstance(self._tracker, NoTracking):
            yield
            return
        self._followed = Followed(self._tracker, self._about())
        try:
            with live.heard_by(self._followed.progress):
                yield
        except BaseException as error:
            self._followed.finish(None, _status_of(error))
            raise

    def deliver(self, results: Callable[[], Results]) -> None:
        """Tell the results of a run that is recorded. One that was not followed is told whole, if it was not yet.

        It comes after the record, because no server may cost a run.
        """
        if isinstance(self._tracker, NoTracking):
            return
        places = _places(self._told)
        if self._followed is None:
            if self._place in places:
                return
            self._followed = Followed(self._tracker, self._about())
        if self._followed.finish(results()) and self._place not in places:
            with suppress(UserError):  # Without the file it is told again, which is no harm.
                files.write({self._told: (json.dumps([*places, self._place], indent=1) + "\n").encode()})


def told_beside(result: Path) -> Path:
    """Return the file that lists the trackers which were told of a run. ``result``: its record or its checkpoint."""
    return result.parent / f"{result.stem}.tracked"


def was_told(place: dict[str, Any], result: Path) -> bool:
    """Return whether a tracker with the settings ``place`` needs to be told nothing more of a run.

    ``result``: the record or the checkpoint of the run.
    """
    none = {"_target_": f"{NoTracking.__module__}.{NoTracking.__qualname__}"}
    return place == none or place in _places(told_beside(result))


def _places(told: Path) -> list[Any]:
    try:
        found = files.read_json(told)
    except (OSError, ValueError):  # none yet, or that of an older version, which is empty
        return []
    return found if isinstance(found, list) else []


def _status_of(error: BaseException) -> int:
    """Return the status with which the command exits."""
    return ending(error)[1] if isinstance(error, KeyboardInterrupt) else 1
