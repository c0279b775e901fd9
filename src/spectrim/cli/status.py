"""Tell how far a grid is: ``spectrim-grid status table5/resnet20/svd_training_long --records build/records``."""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from hydra.initialize import initialize_config_dir

from spectrim.cli.grid import MISTAKES
from spectrim.records import records
from spectrim.runs import configuration
from spectrim.runs.cells import Cell, cells
from spectrim.tools import files

COMMITTED = Path("results/records")  # they tell how long a cell takes where the grid itself does not


@dataclass(frozen=True)
class State:
    """How one cell stands.

    ``word``: done, failed or missing.
    ``why``: the reason of a failure, or the checkpoint that is missing.
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
    words += [f"{counted[word]} {word}" for word in ("failed", "missing") if counted[word]]
    if counted["done"] < len(states):
        words.append("hours left unknown" if hours is None else f"{hours:.{1 if hours >= 1 else 2}f} hours left")
    return f"{grid}: {', '.join(words)}"


def line(cell: Cell, state: State) -> str:
    """Return the line of one cell."""
    why = f": {state.why}" if state.why else f" ({state.seconds:.0f} s)" if state.word == "done" else ""
    return f"  {state.word:<7} {' '.join(cell.overrides)}{why}"


def report(name: str, folder: Path) -> bool:
    """Print how far a grid is, cell by cell, or how far each grid of a folder is. Return whether all cells are done."""
    grids, done = configuration.grids_called(name), True
    with initialize_config_dir(configuration.CONF, version_base="1.3"):
        for grid in grids:
            found = cells(grid)
            states = [state_of(cell, folder) for cell in found]
            done = done and all(state.word == "done" for state in states)
            print(summary(grid, states))
            for cell, state in zip(found, states, strict=True) if len(grids) == 1 else ():
                print(line(cell, state))
    return done


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of ``spectrim-grid``. Return 0 where every cell is done, else 1."""
    parser = argparse.ArgumentParser(prog="spectrim-grid", description="Tell how far a committed grid is.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    status = commands.add_parser("status", help="tell which cells are done, failed or missing, and the hours left")
    status.add_argument("experiment", metavar="EXPERIMENT", help="a grid, such as table9/refit, or a folder of grids")
    status.add_argument("--records", type=Path, default=Path("build/records"), help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        return 0 if report(options.experiment, options.records) else 1
    except MISTAKES as error:
        print(f"spectrim-grid: {configuration.innermost(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
