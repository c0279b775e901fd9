"""Looks: methods of one figure differ in marker, for those who see few colours, and in colour."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from spectrim.report import figure, frontier, looks
from spectrim.report.looks import Look

FIGURE_4 = [Look(own.colour, own.marker) for own in (figure.DENSE, *frontier.CURVES.values())] + [looks.BEST]
FIGURE_1 = [Look(own.colour, own.marker) for own in (figure.DENSE, *figure.SERIES.values())]


def lab(colour: str) -> Any:
    """Return a colour in CIELAB, D65: lightness in [0, 100], a and b."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(np.maximum(to_xyz @ linear / [0.9505, 1, 1.089], 0.0026))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("shown", [FIGURE_1, FIGURE_4], ids=["figure 1", "figure 4"])
def test_methods_of_a_figure_differ_in_marker_and_colour(shown: Sequence[Look]) -> None:
    for first, second in combinations(shown, 2):
        assert first.marker != second.marker and np.linalg.norm(lab(first.colour) - lab(second.colour)) > 25


def test_a_star_is_drawn_larger_than_what_fills_its_circle() -> None:
    assert looks.size("o", 5) == 5 < min(looks.size("*", 5), looks.size((4, 1, 0), 5))
