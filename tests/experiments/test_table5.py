"""Table 5 and Figure 5: what they say of made-up trainings is what was made up."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
from matplotlib.figure import Figure

from spectrim.records import records
from spectrim.tools import files

Script = Callable[[str], ModuleType]


@pytest.fixture
def rows(built: Callable[[str], Path]) -> pd.DataFrame:
    return pd.read_csv(built("table5") / "tables" / "table5.csv").set_index("method")


def test_every_method_has_a_row_beside_what_was_published(rows: pd.DataFrame) -> None:
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


def test_a_training_from_scratch_is_held_against_the_trained_net_of_its_seed(rows: pd.DataFrame) -> None:
    assert rows["test_accuracy"]["dense"] == pytest.approx(0.91)  # not that of the untrained one
    scratch = rows.loc["SVD training from scratch, hoyer 0.01, ε 0.02, 2 cuts"]
    assert scratch["change_pp"] == pytest.approx(100 * (scratch["test_accuracy"] - 0.91))
    assert scratch["epochs"] == 3 and scratch["seconds"] == pytest.approx(2.5)


def test_the_figure_follows_every_layer_over_the_epochs(built: Callable[[str], Path]) -> None:
    drawn = pd.read_csv(built("figure5") / "tables" / "figure5.csv")
    assert sorted(set(drawn["panel"])) == [
        f"lenet5, mnist, {start}, hoyer 0.01, ε 0.02, 2 cuts, 3 epochs"
        for start in ("from a trained net", "from scratch")
    ]
    one = drawn[drawn["panel"].str.contains("scratch")]
    assert one[one["layer"] == "conv1"]["rank"].tolist() == [64, 9, 8, 7]  # the full rank first
    assert one[one["layer"] == "fc1"]["rank"].tolist() == [64, 30.5, 29.5, 28.5]
    assert one["epoch"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_the_second_figure_has_what_each_selection_saw(built: Callable[[str], Path]) -> None:
    drawn = pd.read_csv(built("figure5") / "tables" / "figure5_losses.csv")
    one = drawn[drawn["panel"].str.contains("scratch")]
    of = {term: own["loss"].tolist() for term, own in one.groupby("term")}
    assert of["task, in training"] == pytest.approx([0.4, 0.3, 0.2])
    assert of["before the cut"] == pytest.approx([0.3, 0.3]) and of["after the cut"] == pytest.approx([0.31, 0.31])
    assert of["lowest refused"] == pytest.approx([0.9, 0.9])  # of a last epoch without a selection there is none
    assert "nuclear" not in of
    pictures = built("figure5") / "figures"
    assert (pictures / "figure5.png").is_file() and (pictures / "figure5_losses.png").is_file()


@pytest.fixture
def untouched(factory: ModuleType, tmp_path: Path) -> Path:
    """Write records of trainings without a regulariser."""
    for one in factory.table5():
        if one["config"]["algorithm"]["_class_"] == "SVDTraining":
            one["config"]["algorithm"]["regulariser"] = "none"
            records.write(tmp_path / "records", one | {"signature": records.signature(one["config"])})
    return tmp_path / "records"


def test_a_training_is_named_in_short_in_the_figure_and_in_full_in_the_table(
    run: Callable[[str, Path, Path], dict[str, Figure]], untouched: Path, tmp_path: Path
) -> None:
    starts = [f"lenet5, mnist, {start}" for start in ("from a trained net", "from scratch")]
    for canvas in run("figure5", untouched, tmp_path).values():
        titles = [axis.get_title().replace("\u00a0", " ").replace("\n", " ") for axis in canvas.axes]
        assert titles == starts
    named = pd.read_csv(tmp_path / "tables" / "figure5.csv")["panel"]
    assert sorted(set(named)) == [f"{start}, none, ε 0.02, 2 cuts, 3 epochs" for start in starts]


def test_the_tables_of_the_figure_are_written_together(
    script: Script, untouched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[set[str]] = []
    monkeypatch.setattr(files, "write", lambda contents: written.append({path.name for path in contents}))
    assert script("figure5").main(["--records", str(untouched), "--out", str(tmp_path)]) == 0
    assert {"figure5.csv", "figure5_losses.csv"} <= written[-1]
