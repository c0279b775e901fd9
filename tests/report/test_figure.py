"""Figures: the same bytes from the same numbers, colours and markers apart."""

import json
from pathlib import Path

import pytest

from spectrim.report import figure


def draw(folder: Path) -> dict[str, bytes]:
    with figure.panels(1, 2, 2.0, 1.5) as (canvas, axes):
        for name, axis in zip(("one", "two"), axes, strict=True):
            axis.plot([1, 2, 3], [0.3, 1.0, 2.5], label=name)
            axis.set(title=name, xlabel="parameters kept (%)")
            figure.losses(axis)
        paths = figure.save(canvas, "plot", folder, {"command": "python x"})
    return {path.name: path.read_bytes() for path in paths}


def test_a_figure_is_the_same_bytes_each_time_and_carries_no_date(tmp_path: Path) -> None:
    first, second = draw(tmp_path / "a"), draw(tmp_path / "b")
    assert first == second
    assert set(first) == {"plot.png", "plot.svg", "plot.provenance.json"}
    assert b"dc:date" not in first["plot.svg"] and b"Software" not in first["plot.png"]
    assert json.loads(first["plot.provenance.json"]) == {"name": "plot", "command": "python x"}


def test_every_method_has_a_colour_and_a_marker_of_its_own() -> None:
    known = (figure.DENSE, *figure.SERIES)
    for own in ("label", "colour", "marker"):
        assert len({getattr(series, own) for series in known}) == len(known)


@pytest.mark.parametrize(("values", "scale"), [([0.30, 0.34], "linear"), ([0.3, 2.5], "log"), ([0.0, 2.5], "linear")])
def test_losses_are_logarithmic_only_where_they_span_much(values: list[float], scale: str) -> None:
    with figure.panels(1, 1, 2.0, 1.5) as (_, (axis,)):
        axis.plot(values)
        figure.losses(axis)
        assert axis.get_yscale() == scale
        assert ("log" in axis.get_ylabel()) == (scale == "log")
