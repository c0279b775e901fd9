"""Table 11: the same refinement after each algorithm, beside the algorithm without it."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest


def test_each_algorithm_has_a_row_with_and_without_refinement(built: Callable[[str], Path]) -> None:
    rows = pd.read_csv(built("table11") / "tables" / "table11.csv")
    assert rows["variant"].tolist() == ["dense", *["joint, ours"] * 2, *["knapsack (BALF), refitted as ours"] * 2]
    assert rows["refined"].tolist()[1:] == ["no", "yes", "no", "yes"]
    assert rows["change_test_loss"].tolist()[1:] == pytest.approx([0.0405, 0.0205, 0.0805, 0.0405])
    assert set(rows["n"].iloc[1:]) == {"2 pairs"}


def test_what_a_refinement_took_is_said_and_nothing_where_there_is_none(built: Callable[[str], Path]) -> None:
    rows = pd.read_csv(built("table11") / "tables" / "table11.csv").set_index("refined")
    for key, value in (("inputs", 200), ("samples", 400), ("refine_seconds", 3), ("distance_before", 0.2)):
        assert rows.loc["yes", key].tolist() == [value, value]
        assert rows.loc["no", key].isna().all()
    assert rows.loc["yes", "distance_after"].tolist() == pytest.approx([0.1, 0.1])
