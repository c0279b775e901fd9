"""Table 9: the default first, then what is different, each held against the run of the same seed."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from spectrim.records import records

Script = Callable[[str], ModuleType]


def test_rows_are_the_default_then_what_is_different(built: Callable[[str], Path]) -> None:
    rows = pd.read_csv(built("table9") / "tables" / "table9.csv").set_index("method")
    assert rows.index.tolist() == [
        "dense",
        "joint selection, default",
        "channel view",
        "no refit",
        "plain factors",
        "refit twice",
        "the first order as it is",
        "no refit; the first order as it is",
    ]
    assert rows["to_default"].iloc[2:].tolist() == pytest.approx([0.005, 0.02, 0.007, -0.002, 0.01, 0.03])
    assert rows["to_default_std"].iloc[2:].tolist() == pytest.approx([0] * 6, abs=1e-9)
    assert rows["to_default"].iloc[:2].isna().all() and rows["to_default_p"].isna().all()  # no spread
    assert rows["change_test_loss_std"].iloc[2] == pytest.approx(0.001 / 2**0.5)
    assert set(rows["n"].iloc[1:]) == {"2 pairs"}


def test_without_the_default_there_is_nothing_to_hold_against(
    script: Script, factory: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for one in factory.table9():
        if one["config"]["algorithm"].get("refit") == 0:
            records.write(tmp_path / "records", one)
    assert script("table9").main(["--records", str(tmp_path / "records"), "--out", str(tmp_path)]) == 1
    assert "hold no run of joint selection with its default settings" in capsys.readouterr().err
