"""Table 4: a row a decomposition, numbers from the records, a verdict where one was promised."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from spectrim.records import records

Script = Callable[[str], ModuleType]


@pytest.fixture
def rows(built: Callable[[str], Path]) -> pd.DataFrame:
    return pd.read_csv(built("table4") / "tables" / "table4.csv")


def test_rows_are_dense_then_every_decomposition_of_each_algorithm_in_one_order(rows: pd.DataFrame) -> None:
    order = ["SVD, channel view", "SVD, spatial view", "Tucker-2"]
    assert rows["method"].tolist() == ["dense", *order, *order]
    assert rows["variant"].tolist() == ["dense", *3 * ["compact, verified"], *3 * ["truncation, ratio 0.5"]]
    assert set(rows["n"][1:]) == {"2 pairs"} and rows["n"][0] == "2"


def test_numbers_are_the_means_of_the_records(rows: pd.DataFrame, recorded: Path) -> None:
    found = [
        one["compressed"]["test"]["loss"]
        for one in records.read_all(recorded, "table4")
        if (one["names"]["algorithm"], one["names"]["decomposer"]) == ("compact", "tucker2")
    ]
    row = rows.set_index(["variant", "method"]).loc[("compact, verified", "Tucker-2")]
    assert len(found) == 2 and row["test_loss"] == pytest.approx(pd.Series(found).mean())
    assert row["test_loss_std"] == pytest.approx(pd.Series(found).std())


def test_only_what_promised_the_loss_is_judged(rows: pd.DataFrame, built: Callable[[str], Path]) -> None:
    judged = rows.set_index(["variant", "method"])["verdict"]
    assert judged["compact, verified"].tolist() == ["does not hold", "holds", "does not hold"]
    assert judged[["dense", "truncation, ratio 0.5"]].isna().all()
    tables = built("table4") / "tables"
    text = (tables / "table4.md").read_text()
    assert "resnet20, compact, verified: test loss not above dense with 1 of 3 decompositions." in text
    assert (tables / "table4.tex").read_text().isascii()


def test_two_settings_are_not_averaged(
    script: Script, factory: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for gamma in (0.1, 0.2):
        one = factory.make("resnet20", "compact", experiment="table4", settings={"verified": True, "gamma": gamma})
        records.write(tmp_path / "records", one)
    assert script("table4").main(["--records", str(tmp_path / "records"), "--out", str(tmp_path)]) == 1
    assert "2 settings of compact, verified with svd_channel on resnet20" in capsys.readouterr().err


def test_what_factored_nothing_has_no_verdict(script: Script, factory: ModuleType, tmp_path: Path) -> None:
    records.write(tmp_path / "records", factory.make("resnet20", "compact", experiment="table4", kept=1.0, change=0.0))
    assert script("table4").main(["--records", str(tmp_path / "records"), "--out", str(tmp_path)]) == 0
    verdicts = pd.read_csv(tmp_path / "tables" / "table4.csv")["verdict"]
    assert verdicts[1] == "not comparable: nothing was factored"
