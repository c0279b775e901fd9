"""Figure 4: its curves are the means of the records, published numbers stand beside the sizes they are of."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from spectrim.records import records

Script = Callable[[str], ModuleType]
CURVES = [
    "uniform truncation",
    "energy truncation",
    "global threshold",
    "ALDS",
    "ALDS, BatchNorm kept",
    "sensitivity (ASVD)",
    "knapsack (BALF)",
    "knapsack (BALF), refitted as ours",
    "joint, ours",
]


@pytest.fixture(scope="module")
def folder(script: Script, factory: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("figure4")
    for one in factory.figure4(("resnet20",)):
        records.write(folder / "records", one)
    assert script("figure4").main(["--records", str(folder / "records"), "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def drawn(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "tables" / "figure4.csv")


def test_rows_are_dense_then_every_curve_from_its_largest_size(drawn: pd.DataFrame) -> None:
    assert drawn["variant"].tolist() == ["dense", *(name for name in CURVES for _ in range(4))]
    for name in CURVES:
        kept = drawn[drawn["variant"] == name]["params_kept"].tolist()
        assert kept == pytest.approx([0.826, 0.7, 0.5, 0.3])
    assert drawn["asked"].iloc[1:9].tolist()[::4] == ["params kept 0.826", "energy 0.926"]
    assert set(drawn["n"].iloc[1:]) == {"3 pairs"}


def test_numbers_are_the_means_of_the_records(drawn: pd.DataFrame, folder: Path) -> None:
    found = [
        one["compressed"]["test"]["accuracy"]
        for one in records.read_all(folder / "records", "figure4")
        if one["names"]["algorithm"] == "knapsack" and one["config"]["algorithm"]["params_kept"] == 0.5
    ]
    row = drawn[drawn["variant"] == "knapsack (BALF)"].iloc[2]
    assert len(found) == 3 and row["test_accuracy"] == pytest.approx(pd.Series(found).mean())
    assert row["test_accuracy_std"] == pytest.approx(pd.Series(found).std())
    assert row["macs_kept"] == pytest.approx(0.55)


def test_published_numbers_stand_beside_their_size_and_judge_alds_alone(drawn: pd.DataFrame, folder: Path) -> None:
    own = drawn[drawn["variant"] == "joint, ours"]
    assert own["published"].iloc[:3].tolist() == pytest.approx([-0.40, -3.37, -25.22]) and own["verdict"].isna().all()
    assert own["published"].isna().iloc[3]
    judged = drawn[drawn["verdict"].notna()]
    assert set(judged["variant"]) == {"ALDS, BatchNorm kept"}
    words = judged["verdict"].str.partition(":")[0].tolist()
    assert words == ["holds", "does not hold", "does not hold"]
    text = (folder / "tables" / "figure4.md").read_text()
    assert "joint against ALDS as published, top-1: −0.03 against −0.40 pp at 82.6 %; " in text
    assert (folder / "tables" / "figure4.tex").read_text().isascii()


def test_a_network_on_two_data_sets_has_every_point_of_both(
    script: Script, factory: ModuleType, tmp_path: Path
) -> None:
    for data in ("cifar10", "mnist"):
        for one in factory.figure4(("resnet20",)):
            one["names"]["data"] = one["config"]["data"]["option"] = data
            signature = records.signature(one["config"])
            records.write(tmp_path / "records", one | {"signature": signature})
    assert script("figure4").main(["--records", str(tmp_path / "records"), "--out", str(tmp_path)]) == 0
    drawn = pd.read_csv(tmp_path / "tables" / "figure4.csv")
    assert set(drawn["model"]) == {"resnet20 on cifar10", "resnet20 on mnist"}
    assert len(drawn) == 2 * (1 + 4 * len(CURVES))
    assert drawn.loc[drawn["variant"] != "dense", "asked"].notna().all()
    excerpt = (tmp_path / "tables" / "figure4_paper.md").read_text()
    assert all(f"| {name}" in excerpt for name in CURVES)


def test_two_settings_are_not_drawn_as_one_point(
    script: Script, factory: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for samples in (500, 2000):
        settings = {"params_kept": 0.5, "samples": samples}
        records.write(tmp_path / "records", factory.make(algorithm="joint", experiment="figure4", settings=settings))
    assert script("figure4").main(["--records", str(tmp_path / "records"), "--out", str(tmp_path)]) == 1
    assert "2 settings of joint, ours at params kept 0.5 on resnet20" in capsys.readouterr().err
