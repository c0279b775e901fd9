"""How the cells of a grid stand: done, running, failed or missing, and the hours that are left."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from spectrim.cli import run_lock
from spectrim.records import records
from spectrim.runs.cells import Cell
from spectrim.tools import files

COMMITTED = Path("results/records")  # they tell how long a cell takes where the grid itself does not


@dataclass(frozen=True)
class State:
    """How one cell stands.

    ``word``: done, running, failed or missing.
    ``why``: the reason of a failure, where it runs, or the checkpoint that is missing.
    ``seconds``: what its run took, here or for the committed record; None where no record tells.
    """

    word: str
    why: str = ""
    seconds: float | None = None


def state_of(cell: Cell, folder: Path) -> State:
    """Return how a cell stands in a folder of records."""
    if cell.signature is None:
        return State("missing", f"its checkpoint {cell.checkpoint} is missing")
    path = records.path_of(folder, cell.experiment, cell.signature)
    if path.exists():
        seconds = _seconds(path)
        return State("failed", f"{path} is damaged: delete it") if seconds is None else State("done", seconds=seconds)
    committed, note = _seconds(records.path_of(COMMITTED, cell.experiment, cell.signature)), records.failure_path(path)
    if where := run_lock.running(path):
        return State("running", where, committed)
    if note.exists():
        return State("failed", str(_read(note).get("reason", "unknown")), committed)
    return State("missing", seconds=committed)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = files.read_json(path)
    except (OSError, ValueError):  # a file that another process replaces or removes, or that is damaged
        return {}
    return found if isinstance(found, dict) else {}


def _seconds(path: Path) -> float | None:
    """Return the seconds of all phases of a recorded run; None where there is no such record."""
    try:
        return float(sum(phase["seconds"] for phase in _read(path)["phases"].values()))
    except (KeyError, TypeError, AttributeError):
        return None


def hours_left(states: Sequence[State]) -> float | None:
    """Return the hours that the cells without a record take, one after the other; None where no record tells.

    A cell that was never recorded counts as the mean of the others.
    """
    known = [state.seconds for state in states if state.seconds is not None]
    left = [state for state in states if state.word != "done"]
    if left and not known:
        return None
    return sum(mean(known) if state.seconds is None else state.seconds for state in left) / 3600


def summary(grid: str, states: Sequence[State]) -> str:
    """Return the line that tells how far a grid is."""
    counted, hours = Counter(state.word for state in states), hours_left(states)
    words = [f"{counted['done']} of {len(states)} cells done"]
    words += [f"{counted[word]} {word}" for word in ("running", "failed", "missing") if counted[word]]
    if counted["done"] < len(states):
        words.append("hours left unknown" if hours is None else f"{hours:.{1 if hours >= 1 else 2}f} hours left")
    return f"{grid}: {', '.join(words)}"


def line(cell: Cell, state: State) -> str:
    """Return the line of one cell."""
    why = f": {state.why}" if state.why else f" ({state.seconds:.0f} s)" if state.word == "done" else ""
    return f"  {state.word:<7} {' '.join(cell.overrides)}{why}"
