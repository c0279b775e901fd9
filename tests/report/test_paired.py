"""Paired differences: the t-test by hand, and which runs are pairs."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

from spectrim.report import paired
from spectrim.report.paired import Paired

RESULTS = Path(__file__).resolve().parents[2] / "results"


def runs(values: dict[tuple[int, int], float], name: str = "a") -> pd.DataFrame:
    rows = [{"seed": seed, "calibration_seed": draw, "x": x, "name": name} for (seed, draw), x in values.items()]
    return pd.DataFrame(rows)


OURS = {(0, 0): 1.0, (1, 1): 3.0, (2, 2): 2.0}
OTHER = {(2, 2): 1.5, (0, 0): 0.0, (1, 1): 1.5}


def test_the_p_value_is_that_of_the_paired_t_test() -> None:
    found = paired.difference(runs(OURS), runs(OTHER), "x")
    assert found == Paired(pytest.approx(1.0), pytest.approx(0.5), 3)
    expected = stats.ttest_rel([1.0, 3.0, 2.0], [0.0, 1.5, 1.5]).pvalue
    assert found is not None and found.p == pytest.approx(expected)
    assert str(found) == f"+1.00 ± 0.50 (p = {expected:.2g})"


def test_two_pairs_by_hand() -> None:
    # One degree of freedom is the Cauchy distribution: P(|t| > 1) = 1/2.
    assert paired.p_value(1.0, math.sqrt(2.0), 2) == pytest.approx(0.5)


@pytest.mark.parametrize(("std", "pairs"), [(math.nan, 1), (0.0, 3), (math.nan, 3)])
def test_without_a_spread_there_is_no_p_value(std: float, pairs: int) -> None:
    assert math.isnan(paired.p_value(1.0, std, pairs))
    assert "no p-value" in str(Paired(1.0, std, pairs))


def test_only_runs_of_one_training_and_one_draw_are_pairs() -> None:
    found = paired.difference(runs(OURS), runs({(0, 0): 0.0, (1, 2): 9.0}), "x")
    assert found is not None and (found.mean, found.pairs) == (1.0, 1)
    assert paired.difference(runs(OURS), runs({(5, 5): 0.0}), "x") is None
    twice = pd.concat([runs(OURS), runs(OURS)])
    assert paired.difference(twice, runs(OTHER), "x") is None


def test_the_best_rival_is_the_one_with_the_highest_mean() -> None:
    worse = runs({key: -1.0 for key in OURS}, "worse")
    found = paired.with_best_rival(pd.concat([worse, runs(OURS), runs(OTHER, "best")]), "name", "a", "x")
    assert found is not None and found[0] == "best" and found[1].mean == pytest.approx(1.0)
    assert paired.with_best_rival(runs(OURS), "name", "a", "x") is None


def test_the_headline_of_figure_4_is_what_its_records_give() -> None:
    rows = pd.read_csv(RESULTS / "tables" / "figure4.csv")
    rows = rows[(rows["model"] == "resnet20") & (rows["asked"] == "params kept 0.3")].set_index("variant")["records"]
    changes = []
    for variant in ("joint, ours", "knapsack (BALF), refitted as ours"):
        found = [
            json.loads((RESULTS / "records" / f"{name}.json").read_text())
            for name in rows[f"{variant}, pivoted, by the loss"].split()
        ]
        found.sort(key=lambda one: (one["seed"], one["calibration_seed"]))
        changes.append(
            [100 * (one["compressed"]["test"]["accuracy"] - one["dense"]["test"]["accuracy"]) for one in found]
        )
    mean = sum(changes[0]) / 3 - sum(changes[1]) / 3
    p = stats.ttest_rel(*changes).pvalue
    for page in ("results/tables/figure4.md", "results/tables/figure4_paper.md", "README.md"):
        text = (RESULTS.parent / page).read_text(encoding="utf-8")
        line = next(line for line in text.splitlines() if "minus its best rival" in line)
        assert f"{mean:+.2f} ± " in line and f"(p = {p:.2g}) at 30 %. Rival: knapsack (BALF)" in line
