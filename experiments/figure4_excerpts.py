"""The excerpts of Figure 4: one network at many sizes, and every network at the sizes that all have."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from spectrim.report import averages, frame
from spectrim.report.frontier import CURVES
from spectrim.report.table import Column, Table

SIZES = (0.826, 0.7, 0.5, 0.4, 0.3)  # shares of the parameters
COMMON = (0.5, 0.3)  # those that every network has
AT_MOST_OFF = 0.02  # share of the parameters: how near a row must be to a size
CHANGE = "change_test_accuracy_pp"
DIFFERENCE = "joint, ours, minus its best rival"


def by_size(name: str, rows: pd.DataFrame, notes: Sequence[str]) -> Table:
    """Return the change of accuracy of one network: a row per selector, a column per size.

    ``rows``: those of one network.
    ``notes``: come last.
    """
    sized = _sized(rows)
    lines = [_line({"variant": variant}, own, "size") for variant, own in sized.groupby("variant", sort=False)]
    network, on = rows[["network", "data"]].iloc[0]
    caption = f"Change of accuracy by parameters kept, {network} on {on}, without fine-tuning"
    dash = f"A dash: no size of this selector is within {100 * AT_MOST_OFF:g} points of the column's."
    notes = [dash, averages.seeds_note(rows), *notes]
    return _table(f"{name}_paper", lines, {"variant": "Δ top-1 (points) at"}, map(_percent, SIZES), caption, notes)


def by_network(name: str, rows: pd.DataFrame, beside: Mapping[str, pd.DataFrame]) -> Table:
    """Return the change of accuracy of all networks: a row per size and selector, a column per network.

    A selector of one network alone is left out. The last row of a size is the difference to the best rival.

    ``beside``: by network, each size and the difference to the best rival there.
    """
    sized = _sized(rows)
    sized = sized[sized.groupby("variant")["model"].transform("nunique") > 1]
    sized = sized.assign(place=[list(CURVES).index(key) for key in sized["curve"]])
    sized = sized.sort_values(["place", "kept", "pivoted", "by_loss"], kind="stable")
    lines = []
    for size in map(_percent, COMMON):
        there = sized[sized["size"] == size].groupby("variant", sort=False)
        lines += [_line({"size": size, "variant": variant}, own, "model") for variant, own in there]
        differences = [
            {"model": model, CHANGE: one["difference"].mean, f"{CHANGE}_std": one["difference"].std}
            for model, found in beside.items()
            for one in found.to_dict(orient="records")
            if _percent(one["size"]) == size
        ]
        if differences:
            lines.append(_line({"size": size, "variant": DIFFERENCE}, pd.DataFrame(differences), "model"))
    notes = [
        "Selectors that were run on several networks. A dash: not run on this one.",
        f"{DIFFERENCE}: the last selector of a column, over pairs of one training and calibration seed, with the best "
        "rival that has pivoted factors too.",
        averages.seeds_note(rows),
    ]
    caption = f"Change of accuracy of every network on {frame.data_of(rows)}, without fine-tuning"
    names = {"size": "params kept", "variant": "Δ top-1 (points)"}
    return _table(f"{name}_paper_networks", lines, names, beside, caption, notes, "size")


def _percent(size: float) -> str:
    return f"{100 * size:g} %"


def _sized(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of curves by size that are near one of ``SIZES``, with that size in percent."""
    rows = rows[rows["curve"].notna() & (rows["curve"] != "verified")]
    near = [next((size for size in SIZES if abs(kept - size) <= AT_MOST_OFF), None) for kept in rows["params_kept"]]
    sized = rows.assign(size=pd.Series([None if size is None else _percent(size) for size in near], rows.index))
    return sized.dropna(subset="size")


def _line(names: Mapping[str, Any], rows: pd.DataFrame, place: str) -> dict[str, Any]:
    """Return a line of a table: its names, then the change of each row and its deviation under the row's ``place``."""
    line = dict(names)
    for row in rows.to_dict(orient="records"):
        line |= {row[place]: row[CHANGE], f"{row[place]}_std": row[f"{CHANGE}_std"]}
    return line


def _table(
    name: str,
    lines: Sequence[Mapping[str, Any]],
    names: Mapping[str, str],
    places: Iterable[str],
    caption: str,
    notes: Sequence[str],
    group: str | None = None,
) -> Table:
    """Return an excerpt with columns of text, the headers ``names`` by key, and one of changes for each place."""
    places = list(places)
    data = pd.DataFrame(lines).reindex(columns=[*names, *(f"{at}{tail}" for at in places for tail in ("", "_std"))])
    columns = [Column(key, header) for key, header in names.items()]
    columns += [Column(at, at, 2, signed=True) for at in places]
    return Table(name, data, columns, caption, notes, group, excerpt=True)
