"""Figures: the same bytes from the same numbers, colours and markers apart."""

import json
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest

from spectrim.report import figure


def draw(folder: Path) -> dict[str, bytes]:
    with figure.panels(2, 2, 1.5, "A message") as (canvas, axes):
        for name, axis in zip(("one", "two"), axes, strict=True):
            axis.plot([1, 2, 3], [0.3, 1.0, 2.5], label=name)
            axis.set(title=name, xlabel="parameters kept (%)")
        figure.losses(axes)
        paths = figure.save(canvas, "plot", folder, {"command": "python x"})
    return {path.name: path.read_bytes() for path in paths}


def test_a_figure_is_the_same_bytes_each_time_and_carries_no_date(tmp_path: Path) -> None:
    first, second = draw(tmp_path / "a"), draw(tmp_path / "b")
    assert first == second
    assert set(first) == {"plot.png", "plot.svg", "plot.provenance.json"}
    assert b"dc:date" not in first["plot.svg"] and b"Software" not in first["plot.png"]
    assert json.loads(first["plot.provenance.json"]) == {"name": "plot", "command": "python x"}


def test_every_method_has_a_colour_and_a_marker_of_its_own() -> None:
    known = (figure.DENSE, *figure.SERIES.values())
    for own in ("name", "colour", "marker"):
        assert len({getattr(curve, own) for curve in known}) == len(known)


def test_an_appendix_shows_the_rows_that_the_figure_leaves_out() -> None:
    rows = pd.DataFrame({"model": ["a", "b", "c"]})
    both = figure.parts("plot", rows, rows["model"] != "b")
    assert [(name, own["model"].tolist()) for name, own in both] == [("plot", ["a", "c"]), ("plot_appendix", ["b"])]
    assert [name for name, _ in figure.parts("plot", rows, rows["model"] != "d")] == ["plot"]


def test_losses_of_all_panels_have_one_logarithmic_axis() -> None:
    with figure.panels(2, 2, 1.5, "A message", share="y") as (_, axes):
        for axis, values in zip(axes, ([0.3, 0.34], [0.3, 2.5]), strict=True):
            axis.plot(values)
        figure.losses(axes)
        assert {axis.get_yscale() for axis in axes} == {"log"}
        assert all(axis.get_ylim() == pytest.approx((0.255, 2.875)) for axis in axes)
        assert [axis.yaxis.label.get_visible() for axis in axes] == [True, False]


def test_the_lowest_panel_of_each_column_carries_the_labels() -> None:
    with figure.panels(5, 3, 1.5, "A message", share="all") as (_, axes):
        assert [axis.xaxis.label.get_visible() for axis in axes] == [False, False, True, True, True]


def test_names_at_the_ends_do_not_overlap() -> None:
    with figure.panels(1, 1, 3.0, "A message") as (canvas, (axis,)):
        axis.set_ylim(0, 10)
        figure.label_ends(
            axis, [(1, 5.0, "lower", "#000000"), (1, 5.1, "upper", "#D55E00"), (1, 1.0, "far", "#009E73")]
        )
        canvas.draw_without_rendering()
        boxes = sorted((text.get_window_extent() for text in axis.texts), key=lambda box: box.y0)
        assert all(low.y1 <= high.y0 for low, high in pairwise(boxes))


def test_a_legend_of_long_names_lies_within_the_figure() -> None:
    names = ["uniform truncation, pivoted", "global threshold, pivoted", "knapsack (BALF), refitted as ours, pivoted"]
    with figure.panels(1, 1, 3.0, "A message") as (canvas, (axis,)):
        for name in names:
            axis.plot([0, 1], [0, 1], label=name)
        figure.legend(canvas, [axis])
        canvas.draw_without_rendering()
        box = canvas.legends[0].get_window_extent()
        assert [text.get_text().replace("\n", " ") for text in canvas.legends[0].get_texts()] == names
        assert box.x0 >= 0 and box.x1 <= canvas.bbox.x1
