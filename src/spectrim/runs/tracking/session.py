"""What a tracker is told: about a run before it begins, numbers while it goes on, and its results at the end."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class About:
    """What is known of a run before it begins.

    ``signature``: names the run. A run that is told again has the same one.
    ``name``: for people.
    ``group``: the table or figure to which it belongs.
    ``kind``: the algorithm, or "training".
    ``tags``: words to filter by.
    ``settings``: the resolved settings, with the names of model, data, decomposer and algorithm, and the commit.
    """

    signature: str
    name: str
    group: str
    kind: str
    tags: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """What a run found.

    ``log``: its steps. A step holds numbers, and mappings of names to numbers, such as the rank of every layer.
    ``summary``: final values by name.
    ``tables``: such as the rank of every layer.
    ``files``: contents by file name, such as the record and the plan.
    """

    log: list[Mapping[str, Any]] = field(default_factory=list)
    summary: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, "pd.DataFrame"] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)


class Session(Protocol):
    """One run, as a tracker follows it. Each method may raise whatever the library of the tracker raises."""

    def log(self, numbers: Mapping[str, float], axis: str) -> None:
        """Report numbers by name. ``axis``: the one among them against which the others are plotted."""

    def finish(self, results: Results | None, status: int) -> None:
        """Deliver what is left and end the run.

        ``results``: those besides the log; None for a run that failed.
        ``status``: the exit status of the run.
        """


class Tracker(Protocol):
    """The settings of a tracker."""

    label: str
    """Its name in messages."""

    def start(self, about: About) -> Session:
        """Begin to follow a run. May raise whatever the library of the tracker raises."""
