"""Kill, starve and crowd every writer of the project, and see whether the work goes on as if nothing had happened.

    python benchmarks/chaos/campaign.py [--quick] [--trials N] [--seed N] [--out FOLDER]

Each trial lets one fault happen to one writer, then runs the same work again without a fault. The second run must
succeed, its files must be those of an unbroken run, and nothing else may lie in the folder. A fault that Python can see
must end in one line. ``--quick``: a part of the trials, about two minutes.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import faults
import fuzz
import pandas as pd
import targets
import torch
from faults import DONE, ERRORS, SIGNALS, Fault
from targets import Target
from tqdm import tqdm

from spectrim.records.provenance import provenance
from spectrim.report.table import provenance_bytes
from spectrim.tools import files

TRIALS = 16  # at most, of one kind of fault on one writer
QUICK_TRIALS = 2
COSTLY = 8  # A costly writer gets this many times fewer.
# The work that processes do at once in one folder, and how many they are.
CROWDS = (
    (targets.GRID, 2),
    (targets.GRID, 3),
    (targets.TRAINING_GRID, 3),
    (targets.SEARCHING_GRID, 3),
    (targets.WORKERS, 2),
)


class Unbroken(NamedTuple):
    """A run without a fault: its calls that change files, its seconds and its files."""

    calls: int
    seconds: float
    files: dict[str, bytes]

    @property
    def patience(self) -> float:
        """Return the seconds after which a run with a fault counts as hanging."""
        return max(faults.HANGS_AFTER, faults.TIMES_UNBROKEN * self.seconds)


Trials = Iterator[tuple[str, str, str | None]]  # the writer or reader, the kind of fault, what went wrong


def main() -> None:
    """Entry of ``make chaos``."""
    parser = argparse.ArgumentParser(description="Kill and starve every writer; see whether the work goes on.")
    parser.add_argument("--quick", action="store_true", help="a part of the trials, about two minutes")
    parser.add_argument("--trials", type=int, default=TRIALS, help="of one kind of fault on one writer, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the calls and moments that are drawn")
    parser.add_argument("--out", type=Path, help="folder of chaos.csv and chaos.md; default: nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a process with threads cannot be forked
    targets.preload()
    number = QUICK_TRIALS if options.quick else options.trials
    started, tried, failed = time.monotonic(), Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for name, kind, complaint in trials(random.Random(options.seed), number, options.quick):
        if name not in {known for known, _ in tried}:
            tqdm.write(f"{time.monotonic() - started:5.0f} s  {name}", file=sys.stderr)
        tried[name, kind] += 1
        if complaint:
            failed[name, kind] += 1
            tqdm.write(f"FAILED  {name}, {kind}: {complaint}", file=sys.stderr)
    rows = [(name, kind, count, failed[name, kind]) for (name, kind), count in tried.items()]
    table = pd.DataFrame(rows, columns=["writer or reader", "fault", "tried", "failed"])
    print(table.to_markdown(index=False))
    print(f"{tried.total():,} tried, {failed.total()} failed, {time.monotonic() - started:.0f} s")
    if options.out:
        origin = provenance(" ".join(sys.argv), None, None) | {
            "seed": options.seed,
            "trials": number,
            "quick": options.quick,
        }
        contents = {
            "chaos.csv": table.to_csv(index=False),
            "chaos.md": _page(table, number),
            "chaos.provenance.json": provenance_bytes("chaos", origin).decode(),
        }
        files.write({options.out / name: text.encode() for name, text in contents.items()})
    sys.exit(bool(failed))


def _page(table: pd.DataFrame, number: int) -> str:
    total = table[["tried", "failed"]].sum()
    return (
        f"**Faults: {total['tried']:,} tried, {total['failed']} failed** (`make chaos`)\n\n"
        f"{table.to_markdown(index=False)}\n\n"
        "A trial fails where a fault ends in anything but one line, where the work cannot go on after it, where its "
        "files then differ from those of an unbroken run in more than times, or where anything but a free lock is left "
        "behind.\n\n"
        f"Each kind of fault meets each writer at every call that changes files, or at {number} calls or moments drawn "
        f"at random where there are more; at {_share(number)} where the writer trains, searches or runs a grid.\n"
    )


def trials(draw: random.Random, number: int, quick: bool) -> Trials:
    """Run all trials: ``number`` of a kind and writer, or with ``quick`` a sample of them."""
    with tempfile.TemporaryDirectory() as scratch:
        for target in targets.TARGETS:
            yield from _of(target, draw, number, quick, Path(scratch))
        if not quick:
            yield from _of_workers(targets.WORKERS, draw, _share(number), Path(scratch))
        for target, processes in CROWDS[:1] if quick else CROWDS:
            yield target.name, f"{processes} processes on one folder", crowded(target, processes, Path(scratch))
    yield from fuzz.trials(draw, number, quick)


def _of(target: Target, draw: random.Random, number: int, quick: bool, scratch: Path) -> Trials:
    """Let faults happen at calls that change files and at random moments."""
    unbroken = _unbroken(target, scratch)
    calls, seconds, _ = unbroken
    if target.costly and not quick:
        number = _share(number)
    planned = [Fault(at, error=error) for error in ERRORS for at in _drawn(draw, calls, number)]
    planned += [Fault(at, signal=one) for one in SIGNALS for at in _drawn(draw, calls, number)]
    planned += [Fault(largest=draw.choice((0, 100, 5000))) for _ in range(1 if quick else 3)]
    planned += [Fault(signal=one, after=draw.uniform(0, seconds)) for one in SIGNALS for _ in range(number)]
    if quick:
        planned = draw.sample(planned, 3 if target.costly else 12)
    for fault in tqdm(planned, target.name, unit="trial", leave=False, disable=None):
        yield target.name, fault.kind, attacked(target, fault, unbroken, scratch)


def _of_workers(target: Target, draw: random.Random, number: int, scratch: Path) -> Trials:
    """Let signals come at random moments to work in several processes, whose calls nobody can number."""
    unbroken = _unbroken(target, scratch)
    for worker in (False, True):
        for one in SIGNALS:
            for _ in range(number):
                fault = Fault(signal=one, after=draw.uniform(0, unbroken.seconds), worker=worker)
                yield target.name, fault.kind, attacked(target, fault, unbroken, scratch)


def _share(number: int) -> int:
    """Return the trials of a costly writer."""
    return max(1, number // COSTLY)


def _drawn(draw: random.Random, calls: int, number: int) -> Sequence[int]:
    return range(calls) if calls <= number else sorted(draw.sample(range(calls), number))


def _fresh(target: Target, scratch: Path) -> Path:
    place = scratch / "trial"
    shutil.rmtree(place, ignore_errors=True)
    (place / "work").mkdir(parents=True)
    target.prepare(place / "work")
    return place / "work"


@cache
def _unbroken(target: Target, scratch: Path) -> Unbroken:
    folder, started = _fresh(target, scratch), time.monotonic()
    end = faults.run(target.work, folder, patience=10 * faults.HANGS_AFTER)
    if end.code != DONE:
        raise RuntimeError(f"{target.name} fails without a fault: {end.message}")
    return Unbroken(end.calls, time.monotonic() - started, targets.contents(folder))


def attacked(target: Target, fault: Fault, unbroken: Unbroken, scratch: Path) -> str | None:
    """Return what is wrong after ``fault`` and another run; None if nothing is."""
    folder = _fresh(target, scratch)
    complaint = faults.run(target.work, folder, fault, unbroken.patience).fits(fault)
    if complaint:
        return f"{fault}: {complaint}"
    again = faults.run(target.work, folder, patience=unbroken.patience)
    if again.code != DONE:
        return f"{fault}: does not go on: {again.message}"
    return _difference(targets.contents(folder), unbroken.files, str(fault))


def crowded(target: Target, processes: int, scratch: Path) -> str | None:
    """Run the work several times at once in one folder; return what is wrong then."""
    unbroken = _unbroken(target, scratch)
    folder = _fresh(target, scratch)
    started = [faults.Trial(target.work, folder, faults.NONE, unbroken.patience) for _ in range(processes)]
    for end in [trial.end() for trial in started]:
        complaint = end.fits(faults.NONE)
        if complaint:
            return complaint
    return _difference(targets.contents(folder), unbroken.files, f"{processes} processes")


def _difference(found: dict[str, bytes], unbroken: dict[str, bytes], where: str) -> str | None:
    missing = sorted(unbroken.keys() - found)
    # The file of a lock may stay where it cannot be deleted. It is free, and the next process takes it.
    more = sorted(name for name in found.keys() - unbroken if not name.endswith((".lock", ".running")))
    changed = sorted(name for name in unbroken.keys() & found if unbroken[name] != found[name])
    said = {"missing": missing, "left behind": more, "changed": changed}
    lines = [f"{what}: {', '.join(names)}" for what, names in said.items() if names]
    return f"{where}: {'; '.join(lines)}" if lines else None


if __name__ == "__main__":
    main()
