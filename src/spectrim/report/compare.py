"""Compare obtained numbers with published ones, and fresh records with committed ones."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import pandas as pd

from spectrim.errors import UserError

PUBLISHED_COLUMNS = ("claim", "source", "arxiv", "where", "model", "data", "metric", "value", "tolerance", "note")


class Word(StrEnum):
    """The outcome of a comparison."""

    HOLDS = "holds"
    FAILS = "does not hold"
    OPEN = "not comparable"


@dataclass(frozen=True)
class Verdict:
    """The outcome of a comparison and the reason for it; no reason where the table around it says enough."""

    word: Word
    why: str = ""

    def __str__(self) -> str:
        return f"{self.word}: {self.why}" if self.why else str(self.word)


def judged(holds: bool, why: str = "") -> Verdict:
    """Return the verdict on a claim that can be decided."""
    return Verdict(Word.HOLDS if holds else Word.FAILS, why)


def counted(met: int, cases: int) -> str:
    """Return, in words, whether a claim holds for all of several cases, for none, or for ``met`` of them."""
    return str(judged(met > 0)) if met in (0, cases) else f"holds for {met} of {cases}"


def read_published(path: Path) -> pd.DataFrame:
    """Read the published numbers: one row per claim and metric. ``tolerance`` is NaN where none can be stated.

    Raises ``UserError`` where the file or a column is missing.
    """
    try:
        frame = pd.read_csv(
            path, dtype={"note": str, "arxiv": str}, keep_default_na=False, na_values={"value": [""], "tolerance": [""]}
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the published numbers {path}: {error}") from error
    missing = [column for column in PUBLISHED_COLUMNS if column not in frame]
    if missing:
        raise UserError(f"{path} lacks the column {', '.join(missing)}")
    return frame


def verdict(published: float, obtained: float | None, tolerance: float | None) -> Verdict:
    """Judge whether the obtained number lies within ``tolerance`` of the published one.

    The verdict is "not comparable" if either ``obtained`` or ``tolerance`` is None or NaN.
    """
    if obtained is None or math.isnan(obtained):
        return Verdict(Word.OPEN, "no run of ours")
    if tolerance is None or math.isnan(tolerance):
        return Verdict(Word.OPEN, "no tolerance can be stated")
    difference = obtained - published
    said = f"{difference:+.4g} from the published {published:g}, tolerance {tolerance:g}"
    return judged(abs(difference) <= tolerance, said)


@dataclass(frozen=True)
class Tolerance:
    """Two numbers agree if ``|fresh - committed| <= absolute + relative * |committed|``."""

    absolute: float
    relative: float = 0.0

    def agree(self, committed: float, fresh: float) -> bool:
        """Return whether two numbers agree. NaN agrees only with NaN."""
        if math.isnan(committed) or math.isnan(fresh):
            return math.isnan(committed) and math.isnan(fresh)
        return abs(fresh - committed) <= self.absolute + self.relative * abs(committed)


# Rounding differs between machines, so a greedy choice between two almost equal ranks may differ too.
# A network that is truncated too far has a loss of several nats, so the tolerance has a relative part.
_LOSS = Tolerance(absolute=0.01, relative=0.02)
RERUN: Mapping[str, Tolerance] = {
    "test_loss": _LOSS,
    "calibration_loss": _LOSS,
    "dense_test_loss": _LOSS,
    "dense_calibration_loss": _LOSS,
    "predicted_change": _LOSS,
    "test_accuracy": Tolerance(0.005),
    "calibration_accuracy": Tolerance(0.005),
    "dense_test_accuracy": Tolerance(0.005),
    "dense_calibration_accuracy": Tolerance(0.005),
    "params_kept": Tolerance(0.02),
    "macs_kept": Tolerance(0.02),
}
RUN_KEYS = ("model", "variant", "seed", "calibration_seed", "signature")


@dataclass(frozen=True)
class Difference:
    """A cell that differs by more than the tolerance, or (``metric`` "row") a row that only one side has."""

    row: str
    metric: str
    committed: float | str
    fresh: float | str

    def __str__(self) -> str:
        return f"{self.row}: {self.metric}: committed {_said(self.committed)}, fresh {_said(self.fresh)}"


def _said(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"


def differences(
    committed: pd.DataFrame,
    fresh: pd.DataFrame,
    tolerance: Mapping[str, Tolerance] = RERUN,
    keys: Sequence[str] = RUN_KEYS,
) -> list[Difference]:
    """Return each cell that differs by more than the tolerance of its column, and each row that one side lacks.

    ``tolerance``: tolerance by column; other columns are not compared. A column that a side lacks is NaN there.
    ``keys``: columns that identify a row. Raises ``UserError`` where two rows of one side have the same keys.
    """
    before, after = _rows(committed, keys), _rows(fresh, keys)
    found = []
    for name in sorted(before | after):
        if name not in before or name not in after:
            found.append(Difference(name, "row", *("there" if name in side else "missing" for side in (before, after))))
            continue
        for metric, allowed in tolerance.items():
            old, new = (_number(side[name].get(metric)) for side in (before, after))
            if not allowed.agree(old, new):
                found.append(Difference(name, metric, old, new))
    return found


def _rows(frame: pd.DataFrame, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
    rows = frame.to_dict(orient="records")
    named = {" / ".join(str(row[key]) for key in keys): {str(key): value for key, value in row.items()} for row in rows}
    if len(named) < len(rows):
        raise UserError(f"two rows have the same {', '.join(keys)}: they cannot be compared")
    return named


def _number(value: Any) -> float:
    return math.nan if value is None or value == "" else float(value)


def summarise(found: Sequence[Difference], compared: int) -> int:
    """Print one line per difference and a summary. Return the exit status: 0 if there is no difference, else 1."""
    for difference in found:
        print(difference)
    loss, top1 = RERUN["test_loss"], RERUN["test_accuracy"]
    print(
        f"{compared} runs compared with the committed ones, {len(found)} differences beyond tolerance "
        f"(loss {loss.absolute:g} + {loss.relative:.0%}, accuracy {100 * top1.absolute:g} pp, "
        f"share kept {100 * RERUN['params_kept'].absolute:g} pp)"
    )
    return 1 if found else 0
