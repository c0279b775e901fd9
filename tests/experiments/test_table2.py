"""Table 2: its numbers are those of the records, its verdicts follow from them."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from spectrim.records import records


@pytest.fixture
def rows(built: Callable[[str], Path]) -> pd.DataFrame:
    return pd.read_csv(built("table2") / "tables" / "table2.csv")


def test_rows_are_dense_then_every_method_for_each_model(rows: pd.DataFrame) -> None:
    assert list(dict.fromkeys(rows["model"])) == ["resnet20", "resnext20", "densenet22", "vgg19_half"]
    assert list(rows[rows["model"] == "resnet20"]["method"]) == [
        "dense",
        "truncation, ratio 0.75",
        "truncation, ratio 0.5",
        "truncation, ratio 0.25",
        "lossless, one-shot",
        "lossless, verified",
        "compact, one-shot",
        "compact, verified",
    ]


def test_numbers_are_the_means_of_the_records(rows: pd.DataFrame, recorded: Path) -> None:
    found = [
        one["compressed"]["test"]["loss"]
        for one in records.read_all(recorded, "table2")
        if one["names"]["model"] == "resnet20" and one["names"]["algorithm"] == "compact"
        if one["config"]["algorithm"]["verified"]
    ]
    row = rows.set_index(["model", "method"]).loc[("resnet20", "compact, verified")]
    assert len(found) == 6 and row["n"] == "2 × 3"
    assert row["test_loss"] == pytest.approx(pd.Series(found).mean())
    assert row["test_loss_std"] == pytest.approx(pd.Series(found).std())


def test_verdict_of_a_row_is_the_sign_of_its_mean_change(rows: pd.DataFrame) -> None:
    judged = rows[rows["method"] != "dense"]
    assert ((judged["change_test_loss"] <= 0) == (judged["verdict"] == "holds")).all()


def test_a_row_that_factored_nothing_has_no_verdict(
    script: Callable[[str], ModuleType], factory: ModuleType, tmp_path: Path
) -> None:
    records.write(tmp_path / "records", factory.make(kept=1.0, change=0.0))
    script("table2").main(["--records", str(tmp_path / "records"), "--out", str(tmp_path)])
    rows = pd.read_csv(tmp_path / "tables" / "table2.csv")
    assert rows["verdict"].iloc[1] == "not comparable: nothing was factored"


def test_every_claim_of_the_abstract_and_the_tables_has_a_verdict(built: Callable[[str], Path]) -> None:
    claims = pd.read_csv(built("table2") / "tables" / "table2_claims.csv").set_index("claim")
    assert claims["verdict"].isin(["holds", "does not hold", "not comparable"]).all()
    assert claims["obtained"].notna().all()
    assert claims.loc["s1-resnext50", "verdict"] == "does not hold"  # the made-up nets drop 60 % at most
    assert claims.loc["s1b-table4-vgg13bn", "verdict"] == "holds"
    assert set(claims.loc[claims["source"].isin(["S1b Table 5", "S1b Table 6"]), "verdict"]) == {"not comparable"}


def test_a_network_with_its_own_weights_is_judged_beside_those_of_its_family(built: Callable[[str], Path]) -> None:
    claims = pd.read_csv(built("table2") / "tables" / "table2_claims.csv")
    own = claims[claims["model"].fillna("").str.contains("its own weights")]
    assert own["claim"].tolist() == ["s1b-table4-resnet50"]  # not of its whole family
    (row,) = own.to_dict(orient="records")
    assert row["verdict"] == "does not hold"
    assert "drop of 56 % or more: +2.0000 ± 0.0100 at 60.0 %" in row["obtained"]
    assert row["obtained"].endswith("−0.0100 ± 0.0100 at 20.0 % (compact, verified)")
    family = claims[(claims["claim"] == "s1b-table4-resnet50") & (claims["model"] == "resnet20")]
    assert "±" not in family["obtained"].item()
