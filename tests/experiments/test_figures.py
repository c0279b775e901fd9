"""Figures: what every figure keeps to, and the verdicts on S1's claims beside Figures 1 to 3."""

import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from spectrim.records import records
from spectrim.report import figure

Script = Callable[[str], ModuleType]


def notes(script: Script, name: str, folder: Path, out: Path) -> str:
    assert script(name).main(["--records", str(folder), "--out", str(out)]) == 0
    return (out / "tables" / f"{name}.md").read_text()


def test_figure1_holds_each_algorithm_against_truncation_of_the_nearest_size(
    built: Callable[[str], Path],
) -> None:
    text = (built("figure1") / "tables" / "figure1.md").read_text()
    assert "vgg19_half: S1 Figure 1 (loss below that of truncation, at the nearest size run) holds for 3 of 4" in text
    assert "lossless, one-shot +0.342 (80 against 75 % kept)" in text


@pytest.mark.parametrize(("bump", "word"), [(0.0, "does not hold"), (1.0, "holds")])
def test_figure2_asks_whether_the_lowest_error_is_the_lowest_loss(
    bump: float, word: str, script: Script, factory: ModuleType, tmp_path: Path
) -> None:
    for ratio in (0.4, 0.6, 0.8, 0.95):
        change = 1 - ratio + (bump if ratio == 0.95 else 0)
        one = factory.make("vgg11", "truncation", experiment="figure2", kept=ratio, change=change, error=1 - ratio)
        records.write(tmp_path / "records", one)
    text = notes(script, "figure2", tmp_path / "records", tmp_path)
    assert f"(the lowest error is not the lowest loss) {word}: error lowest at truncation, ratio 0.95" in text


def test_figure3_says_how_many_algorithms_lie_below_the_original(built: Callable[[str], Path]) -> None:
    text = (built("figure3") / "tables" / "figure3.md").read_text()
    assert "densenet22: S1 Figure 3 (loss below the original's under 0 < rank < break-even) holds for 2 of 4" in text
    assert "truncation is below the original at 0 of 9 ranks" in text


def test_figure3_without_the_runs_of_table2_draws_the_sweep_alone(
    script: Script, factory: ModuleType, tmp_path: Path
) -> None:
    for one in factory.figure("figure3", (0.2, 0.5, 0.8), ["densenet22"]):
        records.write(tmp_path / "records", one)
    text = notes(script, "figure3", tmp_path / "records", tmp_path)
    assert "not comparable: no lossless or compact run" in text


FIGURES = ("figure1", "figure2", "figure3", "figure4", "figure5", "figure6", "figure7", "figure8", "figure9")


@pytest.fixture
def drawn(built: Callable[[str], Path], canvases: dict[str, Figure]) -> dict[str, Figure]:
    """Return every figure that the scripts save, by its name."""
    for name in FIGURES:
        built(name)
    return canvases


def test_every_figure_has_a_message_and_fits_a_page_with_letters_of_9_points(drawn: dict[str, Figure]) -> None:
    assert set(FIGURES) <= set(drawn)
    for name, canvas in drawn.items():
        assert canvas.get_suptitle(), name
        assert canvas.get_figwidth() == figure.WIDTH
        small = [text.get_text() for text in canvas.findobj(Text) if text.get_text() and text.get_fontsize() < 9]
        # Exponents of ten are set smaller by mathtext, inside a text of 9 points.
        assert not small, (name, small)


def test_a_main_figure_has_at_most_six_panels_and_figure_4_has_one(drawn: dict[str, Figure]) -> None:
    shown = {
        name: sum(axis.axison for axis in canvas.axes)
        for name, canvas in drawn.items()
        if not name.endswith("_appendix")
    }
    assert max(shown.values()) <= 6 and shown["figure4"] == 1


def entries(axis: Axes) -> list[tuple[Line2D, str]]:
    """Return each line that the axis gives to the legend, without its error bars, and its label."""
    given: Any = zip(*axis.get_legend_handles_labels(), strict=True)
    return [(handle[0] if isinstance(handle, tuple) else handle, label) for handle, label in given]


def shape(line: Line2D) -> tuple[Any, ...]:
    """Return what is left of a look without its colour: the marker, whether it is hollow or has an edge, the dashes."""
    hollow = line.get_markerfacecolor() in ("white", "none")
    return line.get_marker(), hollow, line.get_markeredgecolor() in ("black", "#000000"), line.get_linestyle()


def lightness(line: Line2D) -> float:
    """Return the lightness of the line's colour, in [0, 1]: the luma of Rec. 709."""
    return float(np.dot(to_rgb(line.get_color()), [0.2126, 0.7152, 0.0722]))


def test_series_of_a_panel_differ_in_shape_or_in_lightness(drawn: dict[str, Figure]) -> None:
    """For those who see few colours."""
    for name, canvas in drawn.items():
        for axis in canvas.axes:
            for (first, label), (second, other) in combinations(entries(axis), 2):
                lighter = lightness(first) - lightness(second)
                assert shape(first) != shape(second) or abs(lighter) > 0.3, (name, label, other)


def test_figure6_has_looks_of_different_shape_for_the_algorithms_of_its_list(script: Script) -> None:
    figure6 = script("figure6")
    assert set(figure6.LOOKS) == set(pd.read_csv(figure6.LISTED)["selector"])
    assert len({look.marker for look in figure6.LOOKS.values()}) == len(figure6.LOOKS)


def test_a_method_has_one_colour_in_all_figures(drawn: dict[str, Figure]) -> None:
    colours: dict[str, set[Any]] = {"truncation": set(), "joint, ours": set(), "knapsack (BALF)": set()}
    for name in ("figure1", "figure3", "figure4_accuracy_parameters", "figure6", "figure8"):
        for axis in drawn[name].axes:
            for line, label in entries(axis):
                colours.get(label, set()).add(to_hex(line.get_color()))
    assert {label: len(found) for label, found in colours.items()} == dict.fromkeys(colours, 1)


def test_a_legend_shows_markers_without_error_bars(drawn: dict[str, Figure]) -> None:
    for name, canvas in drawn.items():
        shown = [handle for legend in canvas.legends for handle in legend.legend_handles]
        assert bool(shown) == (name != "figure4") and all(isinstance(handle, Line2D) for handle in shown), name


@pytest.mark.parametrize("name", ["figure1", "figure2", "figure3"])
def test_no_marker_is_cut_off_by_its_panel(drawn: dict[str, Figure], name: str) -> None:
    canvas = drawn[name]
    canvas.draw_without_rendering()
    for axis in filter(lambda axis: axis.axison, canvas.axes):
        for line in axis.lines:
            # The caps of error bars are markers too.
            if line.get_marker() in ("None", "", "_", "|") or not line.get_clip_on():
                continue
            radius = line.get_markersize() / 2 * canvas.dpi / 72
            for x, y in axis.transData.transform(line.get_xydata()):
                assert axis.bbox.x0 + radius <= x <= axis.bbox.x1 - radius, (line.get_label(), x)
                assert axis.bbox.y0 + radius <= y <= axis.bbox.y1 - radius, (line.get_label(), y)


def test_the_appendix_of_figure_7_counts_what_cuts_no_layer(drawn: dict[str, Figure]) -> None:
    said = "2 of the 3 selections that Figure 7 leaves out keep every layer whole"
    assert drawn["figure7_appendix"].get_suptitle() == said


def test_figure3_takes_the_algorithms_of_a_classifier_of_torchvision(
    script: Script, factory: ModuleType, tmp_path: Path
) -> None:
    for algorithm, experiment in (("truncation", "figure3"), ("compact", "table2")):
        one = factory.make("torchvision", algorithm, experiment=experiment)
        one["config"]["model"]["name"] = "vgg16_bn"
        records.write(tmp_path / "records", one | {"signature": records.signature(one["config"])})
    assert "vgg16_bn: S1 Figure 3" in (text := notes(script, "figure3", tmp_path / "records", tmp_path))
    assert "not comparable" not in text


@pytest.mark.parametrize("name", ["figure1", "figure3", "figure4_loss_parameters", "figure4_loss_macs"])
def test_no_axis_and_no_bar_reaches_a_loss_of_zero(drawn: dict[str, Figure], name: str) -> None:
    for axis in drawn[name].axes:
        if axis.axison:
            assert axis.get_yscale() == "log" and axis.get_ylim()[0] > 0.1
            assert all(path.vertices[:, 1].min() > 0.1 for bars in axis.collections for path in bars.get_paths())


def test_a_bar_ends_at_the_lowest_value_and_a_single_run_has_none() -> None:
    rows = pd.DataFrame({"loss": [3.0, 1.0, 0.5], "loss_std": [4.0, 0.25, math.nan]})
    assert figure.bars(rows, "loss", 0.75).to_numpy().tolist() == [[2.25, 0.25, 0.0], [4.0, 0.25, 0.0]]
