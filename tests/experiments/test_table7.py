"""Table 7: what it says of a made-up first order is what was made up."""

import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from spectrim.records import records

Script = Callable[[str], ModuleType]


def test_a_perfect_prediction_agrees_in_everything(script: Script) -> None:
    probes = pd.DataFrame({"predicted": [-2.0, 1.0, 3.0], "measured": [-2.0, 1.0, 3.0]})
    found = script("table7").measures(probes)
    assert (found["sign_agreement"], found["ratio"], found["predicted_lower"], found["lowered"]) == (1.0, 1.0, 1, 1)
    assert found["rank_correlation"] == pytest.approx(1.0)


def test_a_prediction_turned_around_agrees_in_nothing(script: Script) -> None:
    probes = pd.DataFrame({"predicted": [-2.0, 1.0, 3.0], "measured": [4.0, -2.0, -6.0]})
    found = script("table7").measures(probes)
    assert (found["sign_agreement"], found["ratio"], found["lowered"]) == (0.0, -2.0, 0)
    assert found["rank_correlation"] == pytest.approx(-1.0)


def test_predictions_of_zero_and_a_single_row_have_no_ratio_and_no_correlation(script: Script) -> None:
    found = script("table7").measures(pd.DataFrame({"predicted": [0.0], "measured": [0.1]}))
    assert math.isnan(found["ratio"]) and math.isnan(found["sign_agreement"]) and math.isnan(found["rank_correlation"])


def test_bins_hold_every_truncation_once_for_each_measure_of_size(built: Callable[[str], Path]) -> None:
    tables = built("table7") / "tables"
    rows = pd.read_csv(tables / "table7.csv")
    assert set(rows.groupby("size")["count"].sum()) == {120}
    entrywise = rows[rows["size"] == "largest entry |δ|"].set_index("bin")
    assert entrywise.loc["0.001 – 0.008", "sign_agreement"] == 1.0
    assert entrywise.loc["> 0.2", "sign_agreement"] < 0.6
    assert "0.008: holds: sign right in 100 %" in (tables / "table7.md").read_text()


def test_a_bound_that_no_truncation_meets_is_not_judged(script: Script, factory: ModuleType, tmp_path: Path) -> None:
    entry = {"layer": "a", "rank": 1, "relative_error": 0.5, "max_abs_error": 0.3, "split": "calibration"}
    log = [entry | {"predicted": -0.1, "measured": 0.1}]
    records.write(tmp_path / "records", factory.make("mlp", "probe", experiment="table7", log=log))
    script("table7").main(["--records", str(tmp_path / "records"), "--out", str(tmp_path)])
    text = (tmp_path / "tables" / "table7.md").read_text()
    assert "not comparable: no truncation of ours is so small, the smallest changes an entry by 0.3" in text


def test_leakage_is_held_against_the_same_run_on_held_out_data(built: Callable[[str], Path]) -> None:
    rows = pd.read_csv(built("table7") / "tables" / "table7_leakage.csv").set_index(["method", "calibration_from"])
    assert [source for _, source in rows.index[:3]] == ["held_out", "train", "test"]
    assert rows.loc[("lossless, verified", "test"), "bought"] == pytest.approx(-0.01 - 0.02)
    assert rows.loc[("lossless, one-shot", "train"), "bought"] == pytest.approx(3 * (0.05 - 0.02))
    assert math.isnan(rows.loc[("lossless, verified", "held_out"), "bought"])
