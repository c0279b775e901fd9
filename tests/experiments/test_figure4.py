"""Figure 4: its curves are the means of the records, published numbers stand beside the sizes they are of."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
from matplotlib.figure import Figure

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
    "knapsack (BALF), refitted as ours, pivoted",
    "joint, ours",
    "joint, ours, pivoted",
]


@pytest.fixture
def folder(built: Callable[[str], Path]) -> Path:
    return built("figure4")


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


def test_numbers_are_the_means_of_the_records(drawn: pd.DataFrame, recorded: Path) -> None:
    found = [
        one["compressed"]["test"]["accuracy"]
        for one in records.read_all(recorded, "figure4")
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
    text = (tmp_path / "tables" / "figure4.md").read_text()
    for data in ("cifar10", "mnist"):
        assert f"\nresnet20 on {data}: joint, pivoted (ours), minus its best rival" in text
    assert text.count("Rival: knapsack (BALF), refitted as ours, pivoted; pairs: 3") == 2  # of the same kind of factors
    assert "\njoint, pivoted (ours), minus its best rival" in excerpt  # of the one network that it shows


@pytest.mark.parametrize(
    ("measure", "said"),
    [
        ("accuracy", "At 1 of 3 sizes, {} is more accurate than joint selection"),
        ("loss", "At 2 of 3 sizes, {} has a lower loss than joint selection"),
    ],
)
def test_the_title_counts_the_sizes_at_which_no_rival_is_better(measure: str, said: str, script: Script) -> None:
    rows = pd.DataFrame(
        {
            "model": ["a"] * 5 + ["b"] * 4,
            "curve": [None, "joint", "joint", "alds", "verified", None, "joint", "alds", "joint"],
            "algorithm": ["dense", "joint", "joint", "alds", "joint", "dense", "joint", "alds", "joint"],
            "pivoted": [None, False, False, False, False, None, False, False, True],
            "by_loss": [False] * 9,
            "params_kept": [1.0, 0.5, 0.3, 0.3, 0.2, 1.0, 0.5, 0.4, 0.6],
            "test_accuracy": [0.9, 0.7, 0.6, 0.8, 0.9, 0.9, 0.5, 0.4, 0.6],
            "test_loss": [0.3, 0.4, 0.6, 0.5, 0.1, 0.3, 0.9, 1.1, 0.5],
        }
    )
    rivals = "no rival with the same kind of factors and refit, and as few parameters,"
    message = script("figure4_drawing").message
    assert message(rows, measure, "params_kept") == said.format(rivals)
    without = rows[rows["curve"] != "joint"]
    assert (
        script("figure4_drawing")
        .message(without, measure, "params_kept")
        .startswith(f"Test {measure} of every selector")
    )


def test_panels_have_the_order_of_the_other_figures_and_room_above_the_highest_point(
    run: Callable[[str, Path, Path], dict[str, Figure]], factory: ModuleType, tmp_path: Path
) -> None:
    for model in ("densenet22", "resnet56", "resnet20"):
        for size in (0.5, 0.3):
            one = factory.make(model, "joint", experiment="figure4", kept=size, change=1 - size)
            records.write(tmp_path / "records", one)
    axes = run("figure4", tmp_path / "records", tmp_path)["figure4_accuracy_parameters"].axes
    assert [axis.get_title() for axis in axes] == ["resnet20", "resnet56", "densenet22"]
    assert [axis.get_ylim()[1] for axis in axes] == pytest.approx([92, 92, 92])  # the dense networks have 91 %


def test_the_picture_of_all_networks_shows_what_several_have_and_no_two_lines_alike(
    run: Callable[[str, Path, Path], dict[str, Figure]], factory: ModuleType, tmp_path: Path
) -> None:
    for one in factory.figure4():
        first, algorithm = one["names"]["model"] == "resnet20", one["config"]["algorithm"]
        if first or one["names"]["algorithm"] != "sensitivity":
            records.write(tmp_path / "records", one)
        if algorithm["_class_"] == "Joint" and one["config"]["decomposer"].get("factors") == "pivoted" and first:
            config = one["config"] | {"algorithm": algorithm | {"refit_by": "loss"}}
            records.write(tmp_path / "records", one | {"config": config, "signature": records.signature(config)})
    axes = run("figure4", tmp_path / "records", tmp_path)["figure4_accuracy_parameters"].axes
    lines: dict[str, tuple] = {}
    for axis in axes:
        handles, names = axis.get_legend_handles_labels()
        for name, handle in zip(names, handles, strict=True):
            line = handle[0] if isinstance(handle, tuple) else handle
            lines[name] = (line.get_color(), line.get_marker(), line.get_linestyle(), line.get_markerfacecolor())
    assert set(CURVES) - set(lines) == {"sensitivity (ASVD)"} and "joint, ours, pivoted, by the loss" in lines
    assert len(set(lines.values())) == len(lines)


def test_the_curve_of_joint_selection_with_pivoted_factors_is_the_strongest_and_no_name_touches_the_axis(
    run: Callable[[str, Path, Path], dict[str, Figure]], recorded: Path, tmp_path: Path
) -> None:
    canvas = run("figure4", recorded, tmp_path)["figure4"]
    canvas.draw_without_rendering()
    axis = canvas.axes[0]
    handles, names = axis.get_legend_handles_labels()
    lines = {name: handle[0] for name, handle in zip(names, handles, strict=True)}
    best = lines.pop("joint, ours, pivoted")
    assert best.get_linestyle() == "-" and best.get_markerfacecolor() == best.get_color()
    assert all(best.get_linewidth() > line.get_linewidth() for line in lines.values())
    assert all(best.get_zorder() > line.get_zorder() for line in lines.values())
    assert all(text.get_window_extent().x0 > axis.bbox.x0 for text in axis.texts)


def test_two_settings_are_not_drawn_as_one_point(
    script: Script, factory: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for samples in (500, 2000):
        settings = {"params_kept": 0.5, "samples": samples}
        records.write(tmp_path / "records", factory.make(algorithm="joint", experiment="figure4", settings=settings))
    assert script("figure4").main(["--records", str(tmp_path / "records"), "--out", str(tmp_path)]) == 1
    assert "2 settings of joint, ours at params kept 0.5 on resnet20" in capsys.readouterr().err


def test_a_refit_by_the_loss_has_lines_of_its_own_and_takes_the_place_of_the_others_in_the_figure(
    run: Callable[[str, Path, Path], dict[str, Figure]], factory: ModuleType, tmp_path: Path
) -> None:
    for one in factory.figure4(("resnet20",)):
        records.write(tmp_path / "records", one)
        algorithm = one["config"]["algorithm"]
        if algorithm["_class_"] in ("Joint", "Refitted") and "pivoted" in str(one["config"]["decomposer"]):
            config = one["config"] | {"algorithm": algorithm | {"refit_by": "loss"}}
            records.write(tmp_path / "records", one | {"config": config, "signature": records.signature(config)})
    figures = run("figure4", tmp_path / "records", tmp_path)
    drawn = pd.read_csv(tmp_path / "tables" / "figure4.csv")
    both = [f"{name}{tail}" for name in CURVES[-3::2] for tail in ("", ", by the loss")]
    assert [name for name in dict.fromkeys(drawn["variant"]) if "pivoted" in name] == both
    handles, names = figures["figure4"].axes[0].get_legend_handles_labels()
    lines = {name: handle[0] for name, handle in zip(names, handles, strict=True)}
    assert set(both) & set(lines) == {name for name in both if name.endswith("by the loss")}
    best = lines.pop("joint, ours, pivoted, by the loss")
    assert all(best.get_linewidth() > line.get_linewidth() for line in lines.values())
    assert "\njoint, by the loss (ours), minus its best rival" in (tmp_path / "tables" / "figure4_paper.md").read_text()


def test_a_rival_that_the_figure_does_not_show_is_compared_too(
    script: Script, factory: ModuleType, tmp_path: Path
) -> None:
    for one in factory.figure4(("resnet20",)):
        records.write(tmp_path / "records", one)
        if one["names"]["algorithm"] == "joint" and one["config"]["decomposer"].get("factors") != "pivoted":
            algorithm = {"_class_": "GlobalThreshold", "params_kept": one["config"]["algorithm"]["params_kept"]}
            config = one["config"] | {"algorithm": algorithm, "batch_norm": "follow"}
            config["decomposer"] = config["decomposer"] | {"factors": "pivoted"}
            names = one["names"] | {"algorithm": "global_threshold"}
            records.write(
                tmp_path / "records",
                one | {"names": names, "config": config, "signature": records.signature(config)},
            )
    assert script("figure4").main(["--records", str(tmp_path / "records"), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "tables" / "figure4_paper.md").read_text()
    assert "0.00 ± 0.00 (no p-value) at 30 %. Rival: global threshold, pivoted; pairs: 3." in text


def test_the_excerpt_of_all_networks_ends_each_size_with_the_difference_to_the_best_rival(
    script: Script, factory: ModuleType, tmp_path: Path
) -> None:
    made = factory.figure4()
    for one in made:
        if one["names"]["algorithm"] != "sensitivity" or one["names"]["model"] == "resnet20":
            records.write(tmp_path / "records", one)
    assert script("figure4").main(["--records", str(tmp_path / "records"), "--out", str(tmp_path)]) == 0
    lines = (tmp_path / "tables" / "figure4_paper_networks.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    heads, *rows = rows
    assert heads[2:] == ["resnet20", "vgg19_half"]
    assert [row[0] for row in rows if row[0]] == ["50 %", "30 %"]
    assert not any("sensitivity" in row[1] for row in rows)  # of one network alone
    changes: dict[str, list[float]] = {}
    for one in made:
        size = one["compressed"]["params"] / one["dense"]["params"]
        stored = one["config"]["decomposer"].get("factors")
        if one["names"]["model"] == "vgg19_half" and stored == "pivoted" and size == 0.3:
            top1 = one["compressed"]["test"]["accuracy"] - one["dense"]["test"]["accuracy"]
            changes.setdefault(one["names"]["algorithm"], []).append(100 * top1)
    ours, rival = (pd.Series(changes[name]) for name in ("joint", "refitted"))
    assert rows[-1][1] == "joint, ours, minus its best rival"
    assert rows[-1][3] == f"{(ours - rival).mean():+.2f} ± {(ours - rival).std():.2f}"
