"""The pictures of Figure 4: one network with the name of each curve at its end, then every network and selector."""

import math
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb

from spectrim.report import figure, frame, looks
from spectrim.report.command import Options
from spectrim.report.frontier import CURVES
from spectrim.report.table import number

# Joint selection with its strongest rivals, which are drawn of one network; figures of their own show the rest.
SHOWN = {
    "joint": "joint selection (ours)",
    "joint, pivoted": "joint, pivoted (ours)",
    "joint, pivoted, by the loss": "joint, by the loss (ours)",
    "refitted, pivoted": "knapsack, pivoted, refit",
    "refitted, pivoted, by the loss": "knapsack, refit by the loss",
    "refitted": "knapsack with our refit",
    "knapsack": "knapsack (BALF)",
    "sensitivity": "sensitivity (ASVD)",
    "aimet": "greedy (AIMET)",
}
UNITS = {"params_kept": "parameters", "macs_kept": "MACs"}
SHARES = {share: f"{unit} kept (%)" for share, unit in UNITS.items()}
MEASURES = {"accuracy": ("test_accuracy", 100), "loss": ("test_loss", 1)}
DEEPEST = 0.2  # accuracy below the dense network's at which a panel ends; the table has all points
LEAST = 0.05  # accuracy that a panel spans at least, so that a change of nothing looks like it
MARGIN = 4  # percent beside the smallest and the largest share, room for a marker and its bar
ROOM = 1  # percentage points of accuracy above the highest value of a panel


def draw_main(rows: pd.DataFrame, options: Options, origin: dict[str, Any]) -> list[Path]:
    """Draw the change of accuracy over the parameters kept, with the name of each curve at its end."""
    shown = _of_best_refit(rows[rows["line"].isin(SHOWN)])
    with figure.panels(1, 1, 3.6, _title(shown, *rows.iloc[0][["network", "data"]])) as (canvas, (axis,)):
        axis.axhline(0, color=figure.DENSE.colour, linewidth=1)
        ends = []
        for key, own in shown.sort_values("params_kept").groupby("line", sort=False):
            _errorbar(axis, own, "params_kept", "change_test_accuracy_pp", 1, -math.inf)
            last = own.iloc[0]
            ends.append((100 * last["params_kept"], last["change_test_accuracy_pp"], SHOWN[str(key)], _colour(last)))
        figure.label_ends(axis, ends)
        axis.annotate("dense", (100, 0), xytext=(2, 0), textcoords="offset points", va="center")
        axis.set(xlabel=SHARES["params_kept"], ylabel="change of test accuracy (points)", xlim=(0, 100))
        axis.set_xticks(range(30, 101, 10))
        return figure.save(canvas, options.name, options.out, origin)


def _of_best_refit(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of one network without the lines that it also has with a refit by the loss; the table has all."""
    better = {line.removesuffix(frame.BY_LOSS) for line in rows["line"].dropna() if line.endswith(frame.BY_LOSS)}
    return rows[~rows["line"].isin(better)]


def _of_several(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the dense rows and those of budgets whose line several networks have, each with its best refit.

    A line counts as one with either refit. One network alone keeps all of its lines.
    """
    rows = pd.concat([_of_best_refit(own) for _, own in rows.groupby("model", sort=False)])
    networks = rows.groupby(rows["line"].str.removesuffix(frame.BY_LOSS))["model"].transform("nunique")
    several = (networks >= min(2, rows["model"].nunique())) & (rows["curve"] != "verified")
    return rows[rows["curve"].isna() | several]


def _title(shown: pd.DataFrame, network: str, data: str) -> str:
    """Return the message: the accuracy that joint selection and its best rival lose at the smallest size of both."""
    sized = shown[shown["target"] == "params_kept"]
    ours, others = sized[sized["curve"] == "joint"], sized[sized["curve"] != "joint"]
    common = set(ours["requested"]) & set(others["requested"])
    if not common:
        return f"{network} on {data}: change of accuracy without fine-tuning, by parameters kept"
    size = min(common)
    there = [own[own["requested"] == size]["change_test_accuracy_pp"] for own in (ours, others)]
    lost, rival = (number(-float(changes.max()), 1) for changes in there)
    return (
        f"{network} on {data} with {100 * size:g} % of its parameters: joint selection loses {lost} points of accuracy "
        f"without fine-tuning, its best rival {rival}"
    )


def draw_all(rows: pd.DataFrame, measure: str, share: str, options: Options, origin: dict[str, Any]) -> list[Path]:
    """Draw one measure over one share, one panel per model, with the lines that several models have."""
    value, scale = MEASURES[measure]
    rows = _of_several(rows)
    models = sorted(dict.fromkeys(rows["model"]), key=frame.model_key)
    kept = 100 * rows.dropna(subset="curve")[share]
    ends = (kept.min() - MARGIN, kept.max() + MARGIN)  # alike in all panels
    with figure.panels(
        len(models), 3, 2.7, message(rows, measure, share), share="y" if measure == "loss" else "none"
    ) as (canvas, axes):
        for model, axis in zip(models, axes, strict=True):
            own = rows[rows["model"] == model]
            dense = float(own[value].iloc[0])
            axis.axhline(scale * dense, color=figure.DENSE.colour, linewidth=1, label=figure.DENSE.name)
            lowest = 0.9 * dense if measure == "loss" else 0.0
            for _, curve in own.dropna(subset="curve").groupby("line", sort=False):
                _errorbar(axis, curve.sort_values(share), share, value, scale, lowest)
            axis.set(title=model, xlabel=SHARES[share], xlim=ends)
            if measure == "accuracy":
                _limit(axis, dense)
        if measure == "loss":
            figure.losses(axes)
        else:
            for axis in axes[::3]:
                axis.set_ylabel("top-1 (%)")
        figure.legend(canvas, axes)
        return figure.save(canvas, f"{options.name}_{measure}_{UNITS[share].lower()}", options.out, origin)


def message(rows: pd.DataFrame, measure: str, share: str) -> str:
    """Return the message: at how many sizes of joint selection no rival that is as small is better.

    Rivals with the same kind of factors are compared, but none with the better kind of refit. A size that none of them
    reaches does not count.
    """
    value, _ = MEASURES[measure]
    met = sizes = 0
    for _, own in rows.groupby("model", sort=False):
        others = own[~own["curve"].isin(["joint", "verified"]) & (own["algorithm"] != "dense")]
        for _, ours in own[own["curve"] == "joint"].iterrows():
            alike = others[(others["pivoted"] == ours["pivoted"]) & (others["by_loss"] <= ours["by_loss"])]
            small = alike[alike[share] <= ours[share]][value]
            if len(small):
                met += not ((small > ours[value]) if measure == "accuracy" else (small < ours[value])).any()
                sizes += 1
    if not sizes:
        return f"Test {measure} of every selector by {UNITS[share]} kept, without fine-tuning"
    better = {"accuracy": "is more accurate", "loss": "has a lower loss"}[measure]
    rivals = f"no rival with the same kind of factors and refit, and as few {UNITS[share]},"
    return f"At {met} of {sizes} sizes, {rivals} {better} than joint selection"


def _errorbar(axis: Axes, own: pd.DataFrame, share: str, value: str, scale: float, lowest: float) -> None:
    """Draw one curve with its standard deviations.

    A curve with BatchNorm kept is dotted. One of pivoted factors is dashed, with hollow markers. The best curve is
    thick and whole, and lies above the others.

    ``lowest``: no bar of the value reaches below it.
    """
    first = own.iloc[0]
    best = first["best"]
    hollow = first["pivoted"] and not best
    marker = looks.BEST.marker if best else CURVES[first["curve"]].marker
    axis.errorbar(
        100 * own[share],
        scale * own[value],
        xerr=100 * own[f"{share}_std"].fillna(0.0),
        yerr=scale * figure.bars(own, value, lowest),
        color=_colour(first),
        marker=marker,
        markerfacecolor="white" if hollow else None,
        linestyle=":" if first["kept"] else "--" if hollow else "-",
        linewidth=2.2 if best else 1.2,
        markersize=looks.size(marker, 6 if best else 4.5),
        capsize=2,
        label=first["variant"],
        zorder=3 if best else None,
    )


def _colour(row: "pd.Series[Any]") -> str:
    """Return the colour of a curve by one of its rows: darker with BatchNorm kept, lighter with pivoted factors."""
    if row["best"]:
        return looks.BEST.colour
    kept, pivoted = bool(row["kept"]), bool(row["pivoted"]) and not row["by_loss"]
    red, green, blue = (pivoted / 2 + part / 2 ** (kept + pivoted) for part in to_rgb(CURVES[row["curve"]].colour))
    return to_hex((red, green, blue))


def _limit(axis: Axes, dense: float) -> None:
    """End a panel of accuracy ``DEEPEST`` below the dense network's, and let it span ``LEAST`` at least."""
    low = max(axis.get_ylim()[0], 100 * (dense - DEEPEST))
    axis.set_ylim(min(low, 100 * (dense - LEAST)), max(axis.dataLim.y1, 100 * dense) + ROOM)
