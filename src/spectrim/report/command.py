"""Shared code of the scripts in ``experiments/``: options, loading of records, and provenance of the output."""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from spectrim.errors import UserError
from spectrim.records import provenance, records
from spectrim.records.records import Record
from spectrim.report import compare, coverage, frame
from spectrim.report.coverage import Coverage
from spectrim.tools import digests


@dataclass(frozen=True)
class Options:
    """Options of a script that builds tables or figures.

    ``script``: name of the script, such as table2 or figure1.
    ``experiment``: name of the experiment whose records are read.
    ``default``: whether that experiment is the script's default.
    ``records``: folder of all records.
    ``out``: folder that receives ``tables/`` and ``figures/``.
    ``against``: folder of the committed records to compare with, or None.
    ``index``: file that lists the runs of each table and figure.
    ``partial``: whether a table may lack runs of its grids.
    ``command``: the command line, for the provenance.
    """

    script: str
    experiment: str
    default: bool
    records: Path
    out: Path
    against: Path | None
    index: Path
    partial: bool
    command: str

    @property
    def name(self) -> str:
        """Name of the output files: the script, after the experiment if it is not the default (smoke-table2)."""
        prefix = "" if self.default else self.experiment.removesuffix(self.script).strip("/").replace("/", "-")
        return f"{prefix}-{self.script}" if prefix else self.script


def run(
    build: Callable[[Options], list[Path]], script: str, experiment: str, arguments: Sequence[str] | None = None
) -> int:
    """Parse the options, build, and print the written paths. Return the exit status.

    A ``UserError`` is printed as one line on stderr and gives exit status 1. Missing runs give exit status 1 too,
    unless ``--partial`` is given. The table is written all the same, and says how many are missing.
    """
    options = parse(script, experiment, str(build.__doc__ or ""), arguments)
    try:
        # The script may overwrite the committed records that it compares with, so it reads them first.
        committed = None if options.against is None else records.read_all(options.against, options.experiment)
        for path in build(options):
            print(path)
        lacks = _say_missing(options)
        if committed is None:
            return lacks
        if not committed:
            raise UserError(f"nothing was compared: {options.against} holds no records of {options.experiment}")
        before, after = frame.runs(committed), frame.runs(load(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return max(lacks, compare.summarise(compare.differences(before, after), len(before)))


def _say_missing(options: Options) -> int:
    """Print how many runs are missing. Return 1 if that is an error."""
    missing = covered(options).note
    if missing:
        print(
            f"{options.script}: {missing.rstrip('.')}" + ("" if options.partial else "; allow it by --partial"),
            file=sys.stderr,
        )
    return int(bool(missing) and not options.partial)


def covered(options: Options) -> Coverage:
    """Return how the records meet the grids of the script. Records of another experiment have no grids to meet."""
    if not options.default:
        return Coverage(0, 0)
    return coverage.of(options.script, options.experiment, options.records, options.index)


def parse(script: str, experiment: str, description: str, arguments: Sequence[str] | None) -> Options:
    """Parse the options of a script. ``arguments``: None stands for ``sys.argv``."""
    parser = argparse.ArgumentParser(description=description.strip().splitlines()[0] if description else None)
    parser.add_argument("--experiment", default=experiment, help="whose records (default: %(default)s)")
    parser.add_argument("--records", type=Path, default=Path("results/records"), help="folder of records")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of tables/ and figures/")
    parser.add_argument(
        "--against", type=Path, help="folder of committed records: list what differs, exit 1 if any does"
    )
    parser.add_argument("--index", type=Path, default=coverage.INDEX, help="file of the runs that each table needs")
    parser.add_argument("--partial", action="store_true", help="exit 0 even if runs of the grids are missing")
    given = sys.argv[1:] if arguments is None else list(arguments)
    parsed = parser.parse_args(given)
    command = shlex.join(["python", f"experiments/{script}.py", *given])
    default = parsed.experiment == experiment
    return Options(
        script,
        parsed.experiment,
        default,
        parsed.records,
        parsed.out,
        parsed.against,
        parsed.index,
        parsed.partial,
        command,
    )


def load(options: Options) -> list[Record]:
    """Read the records of the experiment.

    Raises ``UserError`` where there are none; the message gives the command that makes them.
    """
    found = records.read_all(options.records, options.experiment)
    if not found:
        how = f"`spectrim -m experiment={options.experiment}`"
        if options.default:
            how = f"`make reproduce-{options.script}`, or fetch them with `spectrim-table {options.script} --fetch`"
        raise UserError(f"no records of {options.experiment} in {options.records}: make them with {how}")
    return found


def runs(options: Options, found: Sequence[Record], algorithms: Sequence[str]) -> pd.DataFrame:
    """Return the rows of ``frame.runs`` of these algorithms. Raises ``UserError`` where there are none."""
    every = frame.runs(found)
    rows = every[every["algorithm"].isin(algorithms)]
    if rows.empty:
        raise lacking(options, " or ".join(filter(None, [", ".join(algorithms[:-1]), algorithms[-1]])))
    return rows


def lacking(options: Options, what: str) -> UserError:
    """Return the error for an experiment that has records, but none of the required kind."""
    return UserError(f"the records of {options.experiment} in {options.records} hold no run of {what}")


def origin(options: Options, found: Sequence[Record], read: Sequence[Path] = ()) -> dict[str, Any]:
    """Return the provenance of a table or figure: its command and commit, and the provenance of its runs.

    ``found``: the records that it uses.
    ``read``: other files that it uses; their digests are listed.
    """
    commit, dirty = provenance.git_state()
    runs = [record["provenance"] for record in found]
    times = sorted(run["time_utc"] for run in runs if run.get("time_utc"))
    checkpoints = {
        f"{record['names']['model']} seed {record['seed']}": record["provenance"].get("checkpoint_digest")
        for record in found
    }
    return {
        "coverage": asdict(covered(options)),
        "command": options.command,
        "commit": commit,
        "dirty": dirty,
        "runs": {
            "count": len(found),
            "commits": _distinct(run.get("commit") for run in runs),
            "dirty": any(run.get("dirty") for run in runs),
            "first_utc": times[0] if times else None,
            "last_utc": times[-1] if times else None,
            "data_digests": _distinct(run.get("data_digest") for run in runs),
            "checkpoint_digests": dict(sorted(checkpoints.items())),
            "lock_digests": _distinct(run.get("lock_digest") for run in runs),
            "machines": _distinct(run.get("machine") for run in runs),
            "versions": _distinct(run.get("versions") for run in runs),
        },
        "files": {path.name: digests.of_file(path) for path in read},
        "records": {records.name_of(record): records.digest(record) for record in found},
    }


def _distinct(values: Any) -> list[Any]:
    """Return each value except None once, in order of first appearance."""
    seen: list[Any] = []
    for value in values:
        if value is not None and value not in seen:
            seen.append(value)
    return seen
