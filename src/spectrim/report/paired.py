"""Compare selectors pair by pair: runs of one training seed and one calibration draw share network and images."""

import math
from dataclasses import dataclass

import pandas as pd
from scipy import stats

from spectrim.report.table import number

PAIR = ["seed", "calibration_seed"]
ROUNDING = 1e-9
TEST = "in points, with the p-value of a two-sided t-test over pairs of one training and calibration seed"


@dataclass(frozen=True)
class Paired:
    """The difference between two selectors over pairs of runs: its mean and standard deviation (ddof = 1)."""

    mean: float
    std: float
    pairs: int

    @property
    def p(self) -> float:
        """The p-value of no difference; see ``p_value``."""
        return p_value(self.mean, self.std, self.pairs)

    def __str__(self) -> str:
        spread = "" if math.isnan(self.std) else f" ± {self.std:.2f}"
        p = "no p-value" if math.isnan(self.p) else f"p = {self.p:.2g}"
        return f"{number(self.mean, 2, True)}{spread} ({p})"


def p_value(mean: float, std: float, pairs: int) -> float:
    """Return the two-sided p-value of Student's t-test that the mean difference of pairs is zero.

    With t = mean / (std / √pairs) and pairs − 1 degrees of freedom. NaN for a single pair, or if all differences are
    equal but for rounding.

    ``std``: standard deviation of the differences (ddof = 1).
    """
    if pairs < 2 or not std > ROUNDING * abs(mean):
        return math.nan
    return float(2 * stats.t.sf(abs(mean) / (std / math.sqrt(pairs)), pairs - 1))


def difference(ours: pd.DataFrame, other: pd.DataFrame, value: str) -> Paired | None:
    """Return the difference ``ours`` − ``other`` of a column; None if they share no pair, or have several runs of one.

    Both frames have the columns ``PAIR``.
    """
    both = ours.merge(other, on=PAIR, suffixes=("", "_other"))
    if both.empty or both.duplicated(PAIR).any():
        return None
    found = both[value] - both[f"{value}_other"]
    return Paired(float(found.mean()), float(found.std(ddof=1)), len(found))


def with_best_rival(runs: pd.DataFrame, named: str, ours: str, value: str) -> tuple[str, Paired] | None:
    """Return the rival with the highest mean, and the difference to it; None if there is no pair.

    ``runs``: those of all selectors at one size.
    ``named``: column with the name of the selector; ``ours`` is the one to compare with the others.
    """
    means = runs[runs[named] != ours].groupby(named, sort=False)[value].mean()
    if means.empty:
        return None
    rival = str(means.idxmax())
    found = difference(runs[runs[named] == ours], runs[runs[named] == rival], value)
    return None if found is None else (rival, found)
