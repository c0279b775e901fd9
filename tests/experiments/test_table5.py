"""Table 5 and Figure 5: what they say of made-up trainings is what was made up."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from spectrim.records import records

Script = Callable[[str], ModuleType]


@pytest.fixture
def tables(script: Script, factory: ModuleType, tmp_path: Path) -> Path:
    for one in factory.table5():
        records.write(tmp_path / "records", one)
    for name in ("table5", "figure5"):
        assert script(name).main(["--records", str(tmp_path / "records"), "--out", str(tmp_path)]) == 0
    return tmp_path / "tables"


def test_every_method_has_a_row_beside_what_was_published(tables: Path) -> None:
    rows = pd.read_csv(tables / "table5.csv").set_index("method")
    scratch, going_on = (
        f"SVD training {start}, hoyer 0.01, ε 0.02, 2 cuts" for start in ("from scratch", "from a trained net")
    )
    ours = ["dense", "truncation, params kept 0.06", "truncation, params kept 0.06, then fine-tuned", scratch, going_on]
    assert rows.index[:5].tolist() == ours
    assert all(name.startswith("published: DLRT") for name in rows.index[5:]) and len(rows) == 8
    assert rows["n"][:5].tolist() == ["2", "2 × 1", "2 × 1", "2 × 1", "2 × 1"]
    assert rows["params_kept"][:5].tolist() == pytest.approx([1, 0.06, 0.06, 0.05, 0.05])
    assert rows["params_kept"].iloc[5:].tolist() == pytest.approx([0.07, 0.03, 0.015])
    assert rows["test_accuracy"].iloc[5:].tolist() == pytest.approx([0.9821, 0.9812, 0.9407])


def test_a_training_from_scratch_is_held_against_the_trained_net_of_its_seed(tables: Path) -> None:
    rows = pd.read_csv(tables / "table5.csv").set_index("method")
    assert rows["test_accuracy"]["dense"] == pytest.approx(0.91)  # not that of the untrained one
    scratch = rows.loc["SVD training from scratch, hoyer 0.01, ε 0.02, 2 cuts"]
    assert scratch["change_pp"] == pytest.approx(100 * (scratch["test_accuracy"] - 0.91))
    assert scratch["epochs"] == 3 and scratch["seconds"] == pytest.approx(2.5)


def test_the_figure_follows_every_layer_over_the_epochs(tables: Path) -> None:
    drawn = pd.read_csv(tables / "figure5.csv")
    assert sorted(set(drawn["panel"])) == [
        f"lenet5, mnist, {start}, hoyer 0.01, ε 0.02, 2 cuts, 3 epochs"
        for start in ("from a trained net", "from scratch")
    ]
    one = drawn[drawn["panel"].str.contains("scratch")]
    assert one[one["layer"] == "conv1"]["rank"].tolist() == [9, 8, 7]
    assert one[one["layer"] == "fc1"]["rank"].tolist() == [30.5, 29.5, 28.5]
    assert one["epoch"].tolist() == [1, 2, 3, 1, 2, 3]


def test_the_second_figure_has_what_each_selection_saw(tables: Path) -> None:
    drawn = pd.read_csv(tables / "figure5_losses.csv")
    one = drawn[drawn["panel"].str.contains("scratch")]
    of = {term: own["loss"].tolist() for term, own in one.groupby("term")}
    assert of["task, in training"] == pytest.approx([0.4, 0.3, 0.2])
    assert of["before the cut"] == pytest.approx([0.3, 0.3]) and of["after the cut"] == pytest.approx([0.31, 0.31])
    assert of["lowest refused"] == pytest.approx([0.9, 0.9])  # of a last epoch without a selection there is none
    assert "nuclear" not in of
    pictures = tables.parent / "figures"
    assert (pictures / "figure5.png").is_file() and (pictures / "figure5_losses.png").is_file()
