"""Table 8: what it says of made-up bounds and selections is what was made up."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest

from spectrim.records import records

Script = Callable[[str], ModuleType]


@pytest.fixture
def made(script: Script, tmp_path: Path) -> Callable[[list[dict[str, Any]]], Path]:
    """Build the tables from some records and return their folder."""

    def make(found: list[dict[str, Any]]) -> Path:
        for one in found:
            records.write(tmp_path / "records", one)
        assert script("table8").main(["--records", str(tmp_path / "records"), "--out", str(tmp_path)]) == 0
        return tmp_path / "tables"

    return make


def test_tightness_is_averaged_over_the_seeds(made: Callable, factory: ModuleType) -> None:
    tables = made(factory.table8())
    rows = pd.read_csv(tables / "table8.csv")
    assert rows["net"].tolist() == ["trained"] * 4 + ["untrained"] * 4
    assert rows["depth"].tolist() == 2 * [2, 2, 10, 10] and rows["ratio"].tolist() == 4 * [0.25, 0.75]
    assert set(rows["n"]) == {"2 × 1"}
    assert rows["tightness"].tolist() == pytest.approx(2 * [0.5, 0.5, 0.1, 0.1])
    assert rows["bound"].tolist() == pytest.approx(2 * [16.5, 16.5, 80.5, 80.5])
    assert rows["bound_std"].tolist() == pytest.approx(8 * [math.sqrt(0.5)])
    text = (tables / "table8.md").read_text()
    assert "holds: 0 of 16 truncations" in text and "between 10 and 50 % of it" in text
    assert (tables / "table8.tex").read_text().isascii()


@pytest.mark.parametrize(("key", "value"), [("measured", 1e6), ("loss_change", -1e6)])
def test_a_bound_that_is_passed_is_said(made: Callable, factory: ModuleType, key: str, value: float) -> None:
    found = copy.deepcopy(factory.table8())
    found[0]["log"][0][key] = value
    assert "does not hold: 1 of 16 truncations" in (made(found) / "table8.md").read_text()


def test_a_net_without_a_bound_is_left_out(made: Callable, factory: ModuleType) -> None:
    found = copy.deepcopy(factory.table8())
    found[0]["log"][0]["bound"] = None
    assert "0 of 15 truncations" in (made(found) / "table8.md").read_text()


def test_theory_and_bisection_stand_side_by_side(made: Callable, factory: ModuleType) -> None:
    tables = made(factory.table8())
    rows = pd.read_csv(tables / "table8_selection.csv")
    assert rows["depth"].tolist() == [2, 10] and set(rows["n"]) == {"2 × 1"}
    for column, value in {
        "epsilon": 0.1,
        "delta_theory": 1e-4,
        "delta_bisect": 0.4,
        "kept_theory": 1.0,
        "kept_bisect": 0.5,
        "rank_bisect": 0.5,
        "test_bisect": 0.05,
        "needed": 0.1 * 0.4 / 1e-4,
    }.items():
        assert rows[column].tolist() == pytest.approx([value, value]), column
    text = (tables / "table8_selection.md").read_text()
    assert "holds: 4 of 4 runs; in 4 of them that δ drops no component" in text
    assert (tables / "table8_selection.tex").read_text().isascii()


def test_a_promise_that_is_broken_is_said(made: Callable, factory: ModuleType) -> None:
    found = copy.deepcopy(factory.table8())
    theory = next(one for one in found if one["config"]["algorithm"].get("delta") == "theory")
    theory["compressed"]["calibration"]["loss"] += 0.2
    assert "does not hold: 3 of 4 runs" in (made(found) / "table8_selection.md").read_text()


def test_a_run_without_its_counterpart_is_left_out(made: Callable, factory: ModuleType) -> None:
    found = [one for one in factory.table8() if one["config"]["algorithm"].get("delta") != "theory" or one["seed"]]
    rows = pd.read_csv(made(found) / "table8_selection.csv")
    assert set(rows["n"]) == {"1 × 1"} and rows["needed_std"].isna().all()


def test_one_kind_of_record_makes_one_table(made: Callable, factory: ModuleType) -> None:
    tables = made([one for one in factory.table8() if one["config"]["algorithm"]["_class_"] == "BoundProbe"])
    assert (tables / "table8.csv").is_file() and not (tables / "table8_selection.csv").exists()
