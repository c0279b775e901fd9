"""What the scripts in ``experiments/`` share: options, the records read, the provenance of what is written."""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from spectrim.errors import UserError
from spectrim.records import provenance, records
from spectrim.records.records import Record
from spectrim.report import compare, frame


@dataclass(frozen=True)
class Options:
    """``script``: table2, figure1, …; ``experiment``: whose records; ``default``: it is the script's own.

    ``records``: the folder of all records; ``out``: that of ``tables/`` and ``figures/``; ``against``: that of the
    committed records to compare with, if any.
    """

    script: str
    experiment: str
    default: bool
    records: Path
    out: Path
    against: Path | None
    command: str

    @property
    def name(self) -> str:
        """Name of the files: that of the script, behind the experiment's if another was asked for (smoke-table2)."""
        prefix = "" if self.default else self.experiment.removesuffix(self.script).strip("/").replace("/", "-")
        return f"{prefix}-{self.script}" if prefix else self.script


def run(
    build: Callable[[Options], list[Path]], script: str, experiment: str, arguments: Sequence[str] | None = None
) -> int:
    """Build on the options and print what was written; the exit status. A UserError is one line on stderr, and 1."""
    options = parse(script, experiment, str(build.__doc__ or ""), arguments)
    try:
        # What is compared against may lie where the script writes: it is read first.
        committed = None if options.against is None else records.read_all(options.against, options.experiment)
        for path in build(options):
            print(path)
        if committed is None:
            return 0
        if not committed:
            raise UserError(f"nothing was compared: {options.against} holds no records of {options.experiment}")
        before, after = frame.runs(committed), frame.runs(load(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return compare.summarise(compare.differences(before, after), len(before))


def parse(script: str, experiment: str, description: str, arguments: Sequence[str] | None) -> Options:
    """The options of a script from its arguments, those of the process where none are given."""
    parser = argparse.ArgumentParser(description=description.strip().splitlines()[0] if description else None)
    parser.add_argument("--experiment", default=experiment, help="whose records (default: %(default)s)")
    parser.add_argument("--records", type=Path, default=Path("results/records"), help="folder of records")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of tables/ and figures/")
    parser.add_argument(
        "--against", type=Path, help="folder of committed records: list what differs, exit 1 if any does"
    )
    given = sys.argv[1:] if arguments is None else list(arguments)
    parsed = parser.parse_args(given)
    command = shlex.join(["python", f"experiments/{script}.py", *given])
    default = parsed.experiment == experiment
    return Options(script, parsed.experiment, default, parsed.records, parsed.out, parsed.against, command)


def load(options: Options) -> list[Record]:
    """The records of the experiment. Raises UserError where there is none, with the command that makes them."""
    found = records.read_all(options.records, options.experiment)
    if not found:
        how = f"make reproduce-{options.script}" if options.default else f"spectrim -m experiment={options.experiment}"
        raise UserError(f"no records of {options.experiment} in {options.records}: make them with `{how}`")
    return found


def runs(options: Options, found: Sequence[Record], algorithms: Sequence[str]) -> pd.DataFrame:
    """The rows of ``frame.runs`` that are of these algorithms. Raises UserError where there is none."""
    every = frame.runs(found)
    rows = every[every["algorithm"].isin(algorithms)]
    if rows.empty:
        raise lacking(options, " or ".join(filter(None, [", ".join(algorithms[:-1]), algorithms[-1]])))
    return rows


def lacking(options: Options, what: str) -> UserError:
    """What to raise where there are records, but none of the kind that is needed."""
    return UserError(f"the records of {options.experiment} in {options.records} hold no run of {what}")


def origin(options: Options, found: Sequence[Record], read: Sequence[Path] = ()) -> dict[str, Any]:
    """What a table or figure is made of: its command and commit, and of the runs behind it all that they tell.

    ``read``: other files it was made from, named by their digest.
    """
    commit, dirty = provenance.git_state()
    runs = [record["provenance"] for record in found]
    times = sorted(run["time_utc"] for run in runs if run.get("time_utc"))
    checkpoints = {
        f"{record['names']['model']} seed {record['seed']}": record["provenance"].get("checkpoint_digest")
        for record in found
    }
    return {
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
        "files": {path.name: provenance.file_digest(path) for path in read},
        "records": {f"{record['experiment']}/{record['signature']}": records.digest(record) for record in found},
    }


def _distinct(values: Any) -> list[Any]:
    """Each value once, in order of first appearance."""
    seen: list[Any] = []
    for value in values:
        if value is not None and value not in seen:
            seen.append(value)
    return seen
