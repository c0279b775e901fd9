"""Figure 7: what each selector keeps of every kind of layer of a language model, block after block (Table 3's runs)."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from spectrim.records.records import Record, class_of
from spectrim.report import command, figure, frame, table
from spectrim.report.command import Options
from spectrim.report.table import Column, Table

AIMED = 0.8  # of several sizes the one that is nearest to this
ACROSS = 2
ALGORITHMS = {"lossless": "lossless", "compact": "compact", "rankselection": "rank selection", "joint": "joint, ours"}
# The end of a layer's name, in Llama, BERT and GPT-2, and what is shown for it.
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
COLOURS = dict(
    zip(
        (kind for _, kind in KINDS),
        ("#0072B2", "#56B4E9", "#009E73", "#000000", "#F0E442", "#CC79A7", "#E69F00", "#D55E00"),
        strict=True,
    )
)
COLUMNS = (
    Column("panel", "model, method"),
    Column("kind", "layer"),
    Column("block", "block", 0),
    Column("rank", "rank", 1),
    Column("kept", "params of the layer kept %", 1, scale=100),
    Column("n", "n"),
)
NOTES = (
    "Mean ± standard deviation (ddof = 1) over the calibration seeds. A layer that stays dense keeps 100 % and counts "
    "with its full rank. Of a method with several budgets, the runs nearest to 80 % of the model's parameters.",
)


def build(options: Options) -> list[Path]:
    """A panel a model and method, a line a kind of layer, and the table of what is drawn."""
    found = command.load(options)
    points = pd.DataFrame([point for record in found for point in _points(record)])
    if points.empty:
        raise command.lacking(options, "a selector of ranks on a language model")
    points["off"] = (points["asked"] - AIMED).abs()
    nearest = points.groupby(["model", "data", "place"])["off"].transform("min")
    points = points[points["off"].fillna(0) == nearest.fillna(0)].sort_values(["model", "place", "order", "block"])
    points["panel"] = points["model"] + ", " + points["method"]
    rows = frame.over_seeds(points, ("panel", "kind", "block"), ["rank", "kept"])
    origin, names = command.origin(options, found), list(dict.fromkeys(rows["panel"]))
    with figure.panels(-(-len(names) // ACROSS), min(ACROSS, len(names)), 3.6, 2.4) as (canvas, axes):
        for name, axis in zip(names, axes, strict=False):
            _panel(axis, rows[rows["panel"] == name], name)
        for axis in axes[len(names) :]:
            axis.set_axis_off()
        figure.legend(canvas, axes)
        drawn = figure.save(canvas, options.name, options.out, origin)
    shown = Table(options.name, rows, COLUMNS, "What Figure 7 shows: kept rank, block after block", NOTES, "panel")
    return drawn + table.save([shown], options.out, origin)


def _points(record: Record) -> list[dict[str, Any]]:
    settings = record["config"]["algorithm"]
    kind = class_of(settings)
    if kind not in ALGORITHMS or _varied(settings) or record["config"]["decomposer"].get("embeddings"):
        return []
    known = ALGORITHMS[kind]
    asked = settings.get("params_kept")
    gamma = f", gamma {settings['gamma']}" if "gamma" in settings else ""
    about = {
        "model": record["config"]["model"].get("name") or record["names"]["model"],
        "data": record["names"]["data"],
        "method": known + gamma + ("" if asked is None else f", {100 * asked:g} %"),
        "asked": asked,
        "place": list(ALGORITHMS).index(kind),
        "seed": record["seed"],
        "calibration_seed": record["calibration_seed"],
    }
    return [about | own for layer in record["layers"] for own in _layer(layer)]


def _varied(settings: dict[str, Any]) -> bool:
    """Joint selection with a refit, which changes no rank, or with another expansion than that of the other runs."""
    return bool(settings.get("refit") or settings.get("interaction") or settings.get("significance", 0) is None)


def _layer(layer: dict[str, Any]) -> list[dict[str, Any]]:
    """One layer of a block, as a point; none where its name says no kind."""
    block = re.search(r"\.(\d+)\.", layer["layer"])
    for order, (pattern, kind) in enumerate(KINDS):
        if block and re.search(f"({pattern})$", layer["layer"]):
            rank = layer["full_rank"] if layer["rank"] is None else layer["rank"]
            kept = layer["params_after"] / layer["params_before"]
            return [{"kind": kind, "order": order, "block": int(block[1]), "rank": rank, "kept": kept}]
    return []


def _panel(axis: Axes, rows: pd.DataFrame, title: str) -> None:
    for kind, own in rows.groupby("kind", sort=False):
        style: Any = {"color": COLOURS[str(kind)], "linewidth": 1.1, "marker": "o", "markersize": 2.5}
        axis.plot(own["block"], 100 * own["kept"], label=str(kind), **style)
        spread = 100 * own["kept_std"].fillna(0.0)
        axis.fill_between(
            own["block"], 100 * own["kept"] - spread, 100 * own["kept"] + spread, color=COLOURS[str(kind)], alpha=0.15
        )
    axis.set_title(title, fontsize=8)
    axis.set(xlabel="block", ylabel="parameters kept (%)", ylim=(0, 105))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script. Return its exit status."""
    return command.run(build, "figure7", "table3", arguments)


if __name__ == "__main__":
    sys.exit(main())
