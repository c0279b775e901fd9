"""Figure 7: the share that each selector keeps of every kind of layer, block by block (records of Table 3)."""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from spectrim.records.records import Record, algorithm_of, name_of
from spectrim.report import averages, command, figure, frame, looks, table
from spectrim.report.command import Options
from spectrim.report.looks import Look
from spectrim.report.table import Column, Table

AIMED = 0.8  # share of the parameters; of several sizes the nearest to it is shown
SHOWN = ("lossless", "rankselection", "joint")  # in the figure; its appendix shows the rest
ALGORITHMS = {"lossless": "lossless", "compact": "compact", "rankselection": "rank selection", "joint": "joint, ours"}
# The end of a layer's name, in Llama, BERT and GPT-2, and the printed kind.
KINDS = (
    (r"q_proj|\.query", "q"),
    (r"k_proj|\.key", "k"),
    (r"v_proj|\.value", "v"),
    (r"attn\.c_attn", "q, k, v"),
    (r"o_proj|attention\.output\.dense|attn\.c_proj", "o"),
    (r"gate_proj", "gate"),
    (r"up_proj|intermediate\.dense|c_fc", "up"),
    (r"down_proj|output\.dense|mlp\.c_proj", "down"),
)
COLOURS = "#0072B2", "#56B4E9", "#009E73", "#000000", "#332288", "#CC79A7", "#E69F00", "#D55E00"
LOOKS = dict(zip((kind for _, kind in KINDS), map(Look, COLOURS, "ov^DsP*X"), strict=True))  # of kinds, not methods
COLUMNS = (
    Column("panel", "model, method"),
    Column("kind", "layer"),
    Column("block", "block", 0),
    Column("rank", "rank", 1),
    Column("kept", "params of the layer kept %", 1, scale=100),
    Column("n", "n"),
)
ABOUT = ("model", "algorithm")  # columns for the code
NOTES = (
    "Each number is a mean ± standard deviation (ddof = 1) over the calibration seeds. A layer that stays dense "
    f"keeps 100 % and its full rank. Of a method with several budgets, the runs nearest to {100 * AIMED:.0f} % of the "
    "parameters are shown.",
)


def build(options: Options) -> list[Path]:
    """Draw one panel per model and method, one line per kind of layer, and build the table of the same numbers."""
    found = command.load(options)
    points = pd.DataFrame([point for record in found for point in _points(record)])
    if points.empty:
        raise command.lacking(options, "a selector of ranks on a language model")
    points["off"] = (points["asked"] - AIMED).abs()
    nearest = points.groupby(["model", "data", "place"])["off"].transform("min")
    points = points[points["off"].fillna(0) == nearest.fillna(0)].sort_values(["model", "place", "order", "block"])
    points["panel"] = points["model"] + ", " + points["method"]
    rows = averages.over_seeds(points, ("panel", "kind", "block", *ABOUT), ["rank", "kept"])
    origin = command.origin(options, found)
    pictures: list[Path] = []
    for name, own in figure.parts(options.name, rows, _main(rows)):
        pictures += _draw(own, _title(own) if name == options.name else _title_beside(own), name, options, origin)
    caption = "Numbers of Figure 7: kept rank, block by block"
    shown = Table(options.name, rows, COLUMNS, caption, NOTES, "panel", ABOUT)
    return pictures + table.save([shown], options.out, origin)


def _main(rows: pd.DataFrame) -> "pd.Series[bool]":
    """Return which rows the figure shows: of each model and algorithm in ``SHOWN``, the setting that removes most."""
    kept = rows.groupby(["model", "algorithm", "panel"], sort=False)["kept"].mean()
    smallest = {panel for _, _, panel in kept.groupby(["model", "algorithm"]).idxmin()}
    return rows["algorithm"].isin(SHOWN) & rows["panel"].isin(smallest)


def _title(rows: pd.DataFrame) -> str:
    """Return the message: the kind of layer of which joint selection keeps least, per model."""
    said = []
    for model, own in rows[rows["algorithm"] == "joint"].groupby("model", sort=False):
        kept = own.groupby("kind")["kept"].mean()
        said.append(f"of the {kept.idxmin()} layers of {model} ({100 * kept.min():.0f} % on average)")
    return f"Joint selection keeps least {' and '.join(said)}" if said else "Parameters kept of every layer"


def _title_beside(rows: pd.DataFrame) -> str:
    """Return the message of the appendix: in how many panels no layer is cut."""
    whole = rows.groupby("panel")["kept"].min() >= 1
    return f"{whole.sum()} of the {len(whole)} selections that Figure 7 leaves out keep every layer whole"


def _draw(rows: pd.DataFrame, title: str, name: str, options: Options, origin: Mapping[str, Any]) -> list[Path]:
    names = list(dict.fromkeys(rows["panel"]))
    with figure.panels(len(names), 3, 2.2, title, share="y") as (canvas, axes):
        for panel, axis in zip(names, axes, strict=True):
            _panel(axis, rows[rows["panel"] == panel], panel)
        figure.legend(canvas, axes, len(LOOKS))
        return figure.save(canvas, name, options.out, origin)


def _points(record: Record) -> list[dict[str, Any]]:
    settings = record["config"]["algorithm"]
    algorithm = algorithm_of(record)
    decomposer = record["config"]["decomposer"]
    otherwise = decomposer.get("embeddings") or "base" in decomposer  # Table 3 has them; base: pivoted factors
    if algorithm not in ALGORITHMS or _varied(settings) or otherwise:
        return []
    asked = settings.get("params_kept")
    gamma = ""
    if "gamma" in settings:
        gamma = ", no gamma" if settings["gamma"] is None else f", gamma {settings['gamma']}"
    about = {
        "record": name_of(record),
        "model": frame.model_of(record),
        "data": record["names"]["data"],
        "algorithm": algorithm,
        "method": ALGORITHMS[algorithm] + gamma + ("" if asked is None else f", {100 * asked:g} %"),
        "asked": asked,
        "place": list(ALGORITHMS).index(algorithm),
        "seed": record["seed"],
        "calibration_seed": record["calibration_seed"],
    }
    return [about | own for layer in record["layers"] for own in _layer(layer)]


def _varied(settings: dict[str, Any]) -> bool:
    """Return whether a joint selection has a refit, which changes no rank, or an unusual expansion."""
    return bool(settings.get("refit") or settings.get("interaction") or settings.get("significance", 0) is None)


def _layer(layer: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one layer of a block as a point; nothing if its name belongs to no kind."""
    block = re.search(r"\.(\d+)\.", layer["layer"])
    for order, (pattern, kind) in enumerate(KINDS):
        if block and re.search(f"({pattern})$", layer["layer"]):
            rank = layer["full_rank"] if layer["rank"] is None else layer["rank"]
            kept = layer["params_after"] / layer["params_before"]
            return [{"kind": kind, "order": order, "block": int(block[1]), "rank": rank, "kept": kept}]
    return []


def _panel(axis: Axes, rows: pd.DataFrame, title: str) -> None:
    for kind, own in rows.groupby("kind", sort=False):
        kept, spread = 100 * own["kept"], 100 * own["kept_std"].fillna(0.0)
        colour, marker = LOOKS[str(kind)]
        style: Any = {"color": colour, "linewidth": 1.1, "marker": marker, "markersize": looks.size(marker, 3.5)}
        axis.plot(own["block"], kept, label=str(kind), **style)
        low, high = (kept - spread).clip(lower=0.0), (kept + spread).clip(upper=100.0)
        axis.fill_between(own["block"], low, high, color=colour, alpha=0.15)
    axis.set(title=fill(title, 30), xlabel="block", ylabel="parameters kept (%)", ylim=(0, 105))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script. Return its exit status."""
    return command.run(build, "figure7", "table3", arguments)


if __name__ == "__main__":
    sys.exit(main())
