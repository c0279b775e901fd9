"""Kill, starve and crowd every writer of the project, and see whether the work goes on as if nothing had happened.

    python benchmarks/chaos/campaign.py [--quick] [--seed N] [--out FOLDER]

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

QUICK_TRIALS, TRIALS, MOMENTS = 2, 40, 12  # a kind of fault and writer


class Unbroken(NamedTuple):
    """A run without a fault: its calls that change files, its seconds and its files."""

    calls: int
    seconds: float
    files: dict[str, bytes]

    @property
    def patience(self) -> float:
        """Return the seconds after which a run with a fault counts as hanging."""
        return max(faults.HANGS_AFTER, faults.TIMES_UNBROKEN * self.seconds)


def main() -> None:
    """Entry of ``make chaos``."""
    parser = argparse.ArgumentParser(description="Kill and starve every writer; see whether the work goes on.")
    parser.add_argument("--quick", action="store_true", help="a part of the trials, about two minutes")
    parser.add_argument("--seed", type=int, default=0, help="of the calls and moments that are drawn")
    parser.add_argument("--out", type=Path, help="folder of chaos.csv and chaos.md; default: nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a process with threads cannot be forked
    started, tried, failed = time.monotonic(), Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for name, kind, complaint in trials(random.Random(options.seed), options.quick):
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
        origin = provenance(" ".join(sys.argv), None, None) | {"seed": options.seed, "quick": options.quick}
        contents = {
            "chaos.csv": table.to_csv(index=False),
            "chaos.md": _page(table),
            "chaos.provenance.json": provenance_bytes("chaos", origin).decode(),
        }
        files.write({options.out / name: text.encode() for name, text in contents.items()})
    sys.exit(bool(failed))


def _page(table: pd.DataFrame) -> str:
    total = table[["tried", "failed"]].sum()
    return (
        f"**Faults: {total['tried']:,} tried, {total['failed']} failed** (`make chaos`)\n\n"
        f"{table.to_markdown(index=False)}\n\n"
        "A trial fails where a fault ends in anything but one line, where the work cannot go on after it, where its "
        "files then differ from those of an unbroken run in more than times, or where anything but a free lock is left "
        "behind.\n"
    )


def trials(draw: random.Random, quick: bool) -> Iterator[tuple[str, str, str | None]]:
    """Run all trials; yield the writer, the kind of fault, and what went wrong (None: nothing)."""
    with tempfile.TemporaryDirectory() as scratch:
        for target in targets.TARGETS:
            yield from _of(target, draw, quick, Path(scratch))
        if not quick:
            yield from _of_moments(targets.WORKERS, draw, MOMENTS, Path(scratch))
        for target in (targets.GRID,) if quick else (targets.GRID, targets.TRAINING_GRID, targets.WORKERS):
            for _ in range(1 if quick else MOMENTS // 3):
                yield target.name, "another process on the same folder", crowded(target, Path(scratch))
    yield from fuzz.trials(draw, quick)


def _of(target: Target, draw: random.Random, quick: bool, scratch: Path) -> Iterator[tuple[str, str, str | None]]:
    """Faults at calls that change files: all of them, or as many as a campaign has time for."""
    unbroken = _unbroken(target, scratch)
    calls, seconds, _ = unbroken
    slow = seconds > 3
    number = QUICK_TRIALS if quick else TRIALS // 4 if slow else TRIALS
    planned = [Fault(at, error=error) for error in ERRORS for at in _drawn(draw, calls, number)]
    planned += [Fault(at, signal=one) for one in SIGNALS for at in _drawn(draw, calls, number)]
    planned += [Fault(largest=draw.choice((0, 100, 5000))) for _ in range(1 if quick else 3)]
    planned += [Fault(signal=one, after=draw.uniform(0, seconds)) for one in SIGNALS for _ in range(number)]
    if quick:
        planned = draw.sample(planned, 3 if slow else 12)
    for fault in tqdm(planned, target.name, unit="trial", leave=False, disable=None):
        yield target.name, fault.kind, attacked(target, fault, unbroken, scratch)


def _of_moments(
    target: Target, draw: random.Random, number: int, scratch: Path
) -> Iterator[tuple[str, str, str | None]]:
    """Signals at random moments, for work in several processes, whose calls nobody can number."""
    unbroken = _unbroken(target, scratch)
    for one in SIGNALS:
        for _ in range(number):
            fault = Fault(signal=one, after=draw.uniform(0, unbroken.seconds))
            yield target.name, fault.kind, attacked(target, fault, unbroken, scratch)


def _drawn(draw: random.Random, calls: int, number: int) -> Sequence[int]:
    return range(calls) if calls <= number else sorted(draw.sample(range(calls), number))


def _fresh(target: Target, scratch: Path) -> Path:
    place = scratch / "trial"
    shutil.rmtree(place, ignore_errors=True)
    (place / "work").mkdir(parents=True)
    target.prepare(place / "work")
    return place / "work"


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


def crowded(target: Target, scratch: Path) -> str | None:
    """Run the work twice at once in one folder; return what is wrong then."""
    unbroken = _unbroken(target, scratch)
    folder = _fresh(target, scratch)
    both = [faults.Trial(target.work, folder, faults.NONE, unbroken.patience) for _ in range(2)]
    for end in [trial.end() for trial in both]:
        complaint = end.fits(faults.NONE)
        if complaint:
            return complaint
    return _difference(targets.contents(folder), unbroken.files, "two processes")


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
