"""Table 1 and Figure 6: the source's rows with its labels, numbers of the records, and dashes where there are none."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
from matplotlib.figure import Figure

from spectrim.records import records

Script = Callable[[str], ModuleType]
Run = Callable[[str, Path, Path], dict[str, Figure]]
SOURCE = ["Cheng", "Kim", "Kim", "Ito", "Sobolev", "Xiao", "Wang", "Cao"]


@pytest.fixture(scope="module")
def two_nets(run: Run, factory: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Figure]]:
    """Build both on two networks. Return the folder and the figures."""
    folder = tmp_path_factory.mktemp("table1")
    for one in factory.table1():
        records.write(folder / "records", one)
    run("table1", folder / "records", folder)
    return folder, run("figure6", folder / "records", folder)


@pytest.fixture
def folder(two_nets: tuple[Path, dict[str, Figure]]) -> Path:
    return two_nets[0]


@pytest.fixture
def rows(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "tables" / "table1.csv")


def of(rows: pd.DataFrame, net: str, approach: str) -> "pd.Series[float]":
    own = rows[rows["block"].str.startswith(net) & rows["approach"].str.startswith(approach)]
    return own.iloc[0]


def test_rows_are_those_of_the_source_then_further_ones_below_a_rule(rows: pd.DataFrame, folder: Path) -> None:
    own = rows[rows["block"].str.startswith("resnet20")]
    assert own["approach"].str.partition(" et al.")[0].tolist()[:8] == SOURCE
    assert own["approach"].iloc[8:10].str.startswith("S2: SVD training").all()
    beside = own[own["block"] == "resnet20, cifar10: not in the source"]
    assert beside["approach"].str.partition(" ")[0].tolist() == ["joint,", "joint,", "S1:", "S1:", "knapsack"]
    assert beside[["layers", "strategy", "timing"]].isna().all(axis=None)
    assert own["block"].iloc[0] == "resnet20, cifar10 (dense 91.00 ± 0.00 %)"
    text = (folder / "tables" / "table1.tex").read_text()
    assert text.partition("\\endhead")[2].count("\\midrule") == 3 and text.isascii()


def test_labels_are_the_sources_and_the_footnotes_say_where_they_do_not_fit(rows: pd.DataFrame, folder: Path) -> None:
    cao = of(rows, "resnet20", "Cao")
    assert cao[["layers", "strategy", "timing"]].tolist() == ["dependent", "heuristic", "post-training"]
    wang = of(rows, "resnet20", "Wang")
    assert wang[["layers", "strategy", "timing"]].tolist() == ["independent", "heuristic", "during training"]
    text = (folder / "tables" / "table1.md").read_text()
    for name in ("Cheng", "Kim", "Ito", "Xiao", "Cao"):
        mark = str(of(rows, "resnet20", name)["approach"]).rpartition(" ")[2]
        assert f"\n{mark} " in text


def test_numbers_are_the_means_of_the_records(rows: pd.DataFrame) -> None:
    accuracy = pd.Series([0.91 - 0.5**2 * (1 + 0.1 * draw) / 5 for draw in range(3)])
    joint = of(rows, "resnet20", "joint")
    assert joint["cut_50"] == pytest.approx(accuracy.mean()) and joint["cut_50_std"] == pytest.approx(accuracy.std())
    assert joint["trained_50"] == pytest.approx(0.91 - (0.91 - accuracy.mean()) / 10)
    assert joint["cut_cpu_seconds"] == pytest.approx(10.3)  # at every size
    assert (joint["cut_read"], joint["trained_read"], joint["n"]) == (20_000, 200_000, "3 pairs")
    assert of(rows, "vgg19_half", "joint")["n"] == "1 × 3"


def test_a_row_without_records_is_dashes_and_one_that_trains_has_nothing_before(rows: pd.DataFrame) -> None:
    numbers = [name for name in rows.columns if name.startswith(("cut_", "trained_"))]
    assert of(rows, "vgg19_half", "Sobolev")[numbers].isna().all()
    assert of(rows, "resnet20", "knapsack")[numbers].isna().all()
    xiao = of(rows, "resnet20", "Xiao")
    assert xiao[["cut_70", "cut_50", "cut_30"]].isna().all() and xiao[["trained_70", "trained_30"]].notna().all()


def test_a_size_of_its_own_stands_at_the_nearest_budget_once(rows: pd.DataFrame, folder: Path) -> None:
    ours = of(rows, "resnet20", "S2: SVD training with rank selection")
    assert ours["trained_50"] == pytest.approx(0.91 - 0.06 / 5)  # the one that kept 48 %, not 54 %
    assert ours[["trained_70", "trained_30"]].isna().all()
    assert of(rows, "resnet20", "S1: lossless")[["cut_70", "cut_50", "cut_30"]].isna().all()
    text = (folder / "tables" / "table1.md").read_text()
    assert "hoyer 0.005, ε 0.1, 2 cuts: 48.0 % (at 50 %)" in text and "verified: 92.0 % (in no column)" in text
    assert "4 epochs beyond the trained net, 16 epochs from scratch" in text
    scratch = of(rows, "resnet20", "S2: SVD training with rank selection, from scratch")
    assert scratch["trained_30"] == pytest.approx(0.91 - 0.06 / 5)


def test_every_size_has_a_row_of_its_own_in_the_second_table(folder: Path) -> None:
    sizes = pd.read_csv(folder / "tables" / "table1_sizes.csv")
    own = sizes[(sizes["model"] == "resnet20") & (sizes["selector"] == "layerthreshold")]
    assert list(zip(own["epochs"], own["asked"], strict=True)) == [
        (epochs, asked) for epochs in (0, 4) for asked in ("70 %", "50 %", "30 %")
    ]
    assert own["passes"].iloc[0] == 240 and own["params_kept"].tolist() == pytest.approx([0.7, 0.5, 0.3] * 2)
    assert sizes[sizes["selector"] == "svdtraining"]["params_kept"].min() == pytest.approx(0.12)


def test_the_figure_draws_what_stands_for_a_budget(folder: Path) -> None:
    drawn = pd.read_csv(folder / "tables" / "figure6.csv")
    panels = list(dict.fromkeys(drawn["panel"]))
    assert panels[0] == "resnet20, cifar10, 70 %, cut alone" and len(panels) == 12
    one = drawn[drawn["panel"] == "resnet20, cifar10, 50 %, trained"]
    assert len(one) == 6 + 3 + 1 and one["cost"].tolist() == one["read"].tolist()
    alone = drawn[drawn["panel"] == "resnet20, cifar10, 50 %, cut alone"]
    assert len(alone) and alone["cost"].tolist() == pytest.approx(alone["cpu_seconds"].tolist())


def test_the_title_holds_joint_selection_against_the_best_other(two_nets: tuple[Path, dict[str, Figure]]) -> None:
    _, canvases = two_nets
    assert set(canvases) == {"figure6", "figure6_appendix"}
    for name, net, rival, seconds in (("figure6", "resnet20", 71.6, 82), ("figure6_appendix", "vgg19_half", 69.4, 41)):
        said = " ".join(canvases[name].get_suptitle().replace("\u00a0", " ").split())
        assert said == (
            f"{net} cut to 30 %: joint selection keeps 80.2 % accuracy in 10 CPU seconds, the best other selector "
            f"{rival} % in {seconds}"
        )


def test_the_message_of_several_networks_is_one_sentence(script: Script) -> None:
    module = script("figure6")
    rows = pd.DataFrame(
        [
            {"selector": name, "test_accuracy": top1, "cost": 10.0, "stage": "cut alone"}
            for name, top1 in (("joint", 0.9), ("alds", 0.8))
        ]
    )
    panels = [module.Panel(model, "data", "cut alone", 0.3, 0.95, rows) for model in ("a", "b")]
    said = "90.0 and 80.0 % (a), 90.0 and 80.0 % (b) accuracy"
    assert module._message(panels) == f"Cut to 30 %, joint selection and the best other selector keep {said}"


def test_the_legend_explains_hollow_markers_where_there_are_any(two_nets: tuple[Path, dict[str, Figure]]) -> None:
    folder, canvases = two_nets
    drawn = pd.read_csv(folder / "tables" / "figure6.csv")
    below = drawn[drawn["test_accuracy"] < drawn["dense_accuracy"] - 0.2]
    for name, net in (("figure6", "resnet20"), ("figure6_appendix", "vgg19_half")):
        (legend,) = canvases[name].legends
        said = [text.get_text() for text in legend.get_texts()]
        assert ("hollow: below the panel" in said) == (net in set(below["model"]))


def test_two_settings_are_not_taken_for_one(
    script: Script, factory: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for samples in (500, 2000):
        settings = {"params_kept": 0.5, "samples": samples}
        records.write(tmp_path / "records", factory.make(algorithm="joint", experiment="table1", settings=settings))
    for name in ("table1", "figure6"):
        assert script(name).main(["--records", str(tmp_path / "records"), "--out", str(tmp_path)]) == 1
        assert "2 settings of joint at 50 %, 0 epochs, on resnet20, cifar10" in capsys.readouterr().err


@pytest.mark.parametrize("place", [lambda own: own, lambda own: {"base": own}], ids=["its own", "of its base"])
def test_pivoted_factors_have_a_row_of_their_own_and_meet_no_plain_rival(
    script: Script, run: Run, factory: ModuleType, tmp_path: Path, place: Callable[[dict[str, str]], dict[str, object]]
) -> None:
    built = {}
    for name in ("plain", "pivoted"):
        for one in factory.table1(nets=("resnet20",)):
            chosen = one["config"]["algorithm"]
            if name == "pivoted" and chosen.get("selector", chosen)["_class_"] == "Joint":
                records.write(tmp_path / name, one)
                one["config"]["decomposer"] |= place({"factors": "pivoted"})
                one["compressed"]["test"]["accuracy"] += 0.01
            records.write(tmp_path / name, one | {"signature": records.signature(one["config"])})
        assert script("table1").main(["--records", str(tmp_path / name), "--out", str(tmp_path / name)]) == 0
        canvas = run("figure6", tmp_path / name, tmp_path / name)["figure6"]
        text = (tmp_path / name / "tables" / "table1.md").read_text()
        rivals = next(line for line in text.splitlines() if line.startswith("Joint selection minus"))
        built[name] = pd.read_csv(tmp_path / name / "tables" / "table1.csv"), rivals, canvas.get_suptitle()
    (plain, *said), (both, *again) = built.values()
    assert said == again
    own = both["approach"] == "joint, ours, pivoted"
    pd.testing.assert_frame_equal(both[~own], plain[plain["approach"] != "joint, ours, pivoted"])
    for key in ("cut_30", "trained_70"):
        assert both[own][key].item() == pytest.approx(of(plain, "resnet20", "joint, ours")[key] + 0.01)
    drawn = pd.read_csv(tmp_path / "pivoted" / "tables" / "figure6.csv")
    assert (drawn["approach"] == "joint, ours, pivoted").sum() == 6  # three sizes, with training and without


def test_a_selection_by_itself_costs_what_the_first_size_did(
    script: Script, factory: ModuleType, tmp_path: Path
) -> None:
    for one in factory.table1(nets=("resnet20",)):
        chosen = one["config"]["algorithm"]
        if chosen["_class_"] == "Joint" and chosen["params_kept"] < 0.7:
            one["samples_read"]["calibration"], one["phases"]["select"]["cpu_seconds"] = 1000, 0.5
        records.write(tmp_path / "records", one)
    for name in ("table1", "figure6"):
        assert script(name).main(["--records", str(tmp_path / "records"), "--out", str(tmp_path)]) == 0
    joint = of(pd.read_csv(tmp_path / "tables" / "table1.csv"), "resnet20", "joint")
    assert joint["cut_read"] == 20_000 and joint["cut_cpu_seconds"] == pytest.approx(10.3)
    drawn = pd.read_csv(tmp_path / "tables" / "figure6.csv")
    alone = drawn[drawn["panel"].str.startswith("resnet20") & (drawn["approach"] == "joint, ours")]
    assert alone[alone["stage"] == "cut alone"]["cost"].tolist() == pytest.approx([10.3] * 3)


def test_runs_that_shared_a_gpu_tell_no_seconds_and_are_drawn_all_the_same(
    script: Script, factory: ModuleType, tmp_path: Path
) -> None:
    for one in factory.table1(nets=("resnet20",)):
        trained = "recipe" in one["config"]["algorithm"]
        one["provenance"]["device"] = "cuda" if trained else "cpu"
        records.write(tmp_path / "records", one)
    for name in ("table1", "figure6"):
        assert script(name).main(["--records", str(tmp_path / "records"), "--out", str(tmp_path)]) == 0
    sizes = pd.read_csv(tmp_path / "tables" / "table1_sizes.csv")
    assert sizes[sizes["epochs"] > 0]["seconds"].isna().all() and sizes[sizes["epochs"] == 0]["seconds"].notna().all()
    drawn = pd.read_csv(tmp_path / "tables" / "figure6.csv")
    assert len(drawn[drawn["panel"] == "resnet20, cifar10, 50 %, trained"]) == 6 + 3 + 1
