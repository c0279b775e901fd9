"""Look after a committed grid: ``spectrim-grid status|failed|rerun EXPERIMENT``, and ``diff`` for two records."""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path

from hydra.initialize import initialize_config_dir

from spectrim.cli import status, streams
from spectrim.cli.differences import differences, found
from spectrim.cli.messages import Parser
from spectrim.cli.status import State
from spectrim.cli.termination import ending, terminable
from spectrim.records import records
from spectrim.runs import configuration
from spectrim.runs.cells import Cell, cells
from spectrim.runs.read_once import read_once

FOLDER = Path("build/records")


def _states(name: str, folder: Path) -> Iterator[tuple[str, list[tuple[Cell, State]]]]:
    """Yield each grid of this name with its cells and how they stand."""
    with initialize_config_dir(configuration.CONF, version_base="1.3"), read_once():
        for grid in configuration.grids_called(name):
            yield grid, [(cell, status.state_of(cell, folder)) for cell in cells(grid)]


def tell(options: argparse.Namespace) -> bool:
    """Print how far a grid is, cell by cell, or how far each grid of a folder is. Return whether all cells are done."""
    grids = list(_states(options.experiment, options.records))
    for grid, stand in grids:
        print(status.summary(grid, [state for _, state in stand]))
        for cell, state in stand if len(grids) == 1 else ():
            print(status.line(cell, state))
    return all(state.word == "done" for _, stand in grids for _, state in stand)


def tell_failed(options: argparse.Namespace) -> bool:
    """Print each failed cell with its reason and its command. Return whether there is none."""
    failed = list(_failed(options.experiment, options.records))
    for grid, cell, state in failed:
        print(f"{grid} {' '.join(cell.overrides)}: {state.why}")
        print(f"  {shlex.join(['spectrim', *_words(grid, cell, options.records)])}")
    if not failed:
        print(f"{options.experiment}: no failed cell in {options.records}")
    return not failed


def rerun(options: argparse.Namespace) -> bool:
    """Run each failed cell again, one after the other. Return whether all of them succeeded."""
    failed = list(_failed(options.experiment, options.records))
    left = 0
    for number, (grid, cell, _) in enumerate(failed, 1):
        if status.state_of(cell, options.records).word != "failed":
            continue  # another process took it up meanwhile
        words = _words(grid, cell, options.records)
        print(f"{number} of {len(failed)}: {shlex.join(['spectrim', *words])}", flush=True)
        if cell.signature is not None:  # A damaged record would be read, not made again.
            path = records.path_of(options.records, cell.experiment, cell.signature)
            if path.exists():
                path.replace(path.with_suffix(".damaged"))
        command = [sys.executable, "-m", "spectrim.cli.run", *words, f"device={options.device}"]
        left += bool(subprocess.run(command, check=False).returncode)
    print(f"{options.experiment}: {len(failed) - left} of {len(failed)} failed cells succeeded")
    return not left


def compare(options: argparse.Namespace) -> bool:
    """Print what differs between two records. Return whether nothing does."""
    paths = [found(given, options.records) for given in (options.first, options.second)]
    differ = differences(*(records.read(path) for path in paths))
    for place, first, second in differ:
        print(f"{place}: {first} | {second}")
    return not differ


def _failed(name: str, folder: Path) -> Iterator[tuple[str, Cell, State]]:
    for grid, stand in _states(name, folder):
        yield from ((grid, cell, state) for cell, state in stand if state.word == "failed")


def _words(grid: str, cell: Cell, folder: Path) -> list[str]:
    """Return the words of the command that runs one cell."""
    return [f"experiment={grid}", *cell.overrides, f"records={folder}"]


def parser() -> Parser:
    """Return the parser of the command line."""
    whole = Parser(prog="spectrim-grid", description="Look after a committed grid of runs.").with_version()
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    for name, call, said in (
        ("status", tell, "tell which cells are done, running, failed or missing, and the hours left"),
        ("failed", tell_failed, "list the failed cells, each with its reason and its command"),
        ("rerun", rerun, "run the failed cells again, one after the other"),
    ):
        command = commands.add_parser(name, help=said, description=f"{said.capitalize()}.")
        command.add_argument(
            "experiment", metavar="EXPERIMENT", help="a grid, such as table9/refit, or a folder of them"
        )
        command.set_defaults(call=call)
        if call is rerun:
            command.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    said = "show what differs between two records"
    command = commands.add_parser("diff", help=said, description=f"{said.capitalize()}.")
    for name in ("first", "second"):
        command.add_argument(name, metavar=name.upper(), help="the file of a record, or the begin of its signature")
    command.set_defaults(call=compare)
    for command in commands.choices.values():
        command.add_argument("--records", type=Path, default=FOLDER, help="folder (default: %(default)s)")
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of ``spectrim-grid``. Return 0 where all is done, no cell failed or the records agree, else 1."""
    options = parser().parse_args(arguments)
    streams.open_closed()
    try:
        with terminable(), redirect_stdout(streams.Outlet(sys.stdout)):
            return 0 if options.call(options) else 1
    except configuration.MISTAKES as error:
        print(f"spectrim-grid: {configuration.innermost(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        word, ended = ending(stop)
        print(f"spectrim-grid: {word}; the same command goes on where it stopped", file=sys.stderr)
        return ended


if __name__ == "__main__":
    sys.exit(main())
