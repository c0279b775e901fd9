"""Figure 4, the frontier: accuracy and loss against parameters and MACs kept, a curve a selector, no fine-tuning."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from spectrim.report import claims, command, compare, figure, frame, table
from spectrim.report.command import Options
from spectrim.report.table import Column, Table, number

PUBLISHED = Path(__file__).with_name("published.csv")
ALDS = "ALDS, published"
KEPT = ", BatchNorm kept"


@dataclass(frozen=True)
class Curve:
    """How a selector is drawn, and its name. ``refits``: its refit moves the BatchNorm means with the factors."""

    name: str
    colour: str
    marker: str
    refits: bool = False


# By the key that ``_curve`` gives, in the order of the legend.
CURVES = {
    "truncation": Curve(frame.SELECTORS["truncation"], "#999999", "s"),
    "energy": Curve("energy truncation", "#E69F00", "D"),
    "globalthreshold": Curve(frame.SELECTORS["globalthreshold"], "#56B4E9", "^"),
    "alds": Curve(frame.SELECTORS["alds"], "#CC79A7", "v"),
    "aimet": Curve(frame.SELECTORS["aimet"], "#8C564B", "d"),
    "sensitivity": Curve(frame.SELECTORS["sensitivity"], "#009E73", "P"),
    "knapsack": Curve(frame.SELECTORS["knapsack"], "#0072B2", "o"),
    "refitted": Curve("knapsack (BALF), refitted as ours", "#332288", "x", refits=True),
    "verified": Curve("joint, ours, loss verified", "#D55E00", "p", refits=True),
    "joint": Curve(frame.SELECTORS["joint"], "#D55E00", "X", refits=True),
}
KEYS = (*frame.KEYS, "curve", "kept")  # the curve, and whether BatchNorm statistics stayed those of the dense network
TARGETS = ("params_kept", "macs_kept", "milliseconds", "max_loss_increase", "energy", "ratio", "rank")
SHARES = {"params_kept": "parameters kept (%)", "macs_kept": "MACs kept (%)"}
DEEPEST = 0.2  # below the dense accuracy: where the panels end; the table has it all
LEAST = 0.05  # of the accuracy, nats of the loss: what a panel spans at the least, for what is nothing to look like it
NEAR = 0.005  # of the parameters: how near a published size is the same size
ABOUT = ("decomposer", "asked")
VALUES = ("params_kept", "macs_kept", "test_accuracy", "change_test_accuracy_pp", "test_loss", "change_test_loss")
COLUMNS = (
    Column("model", "model"),
    Column("variant", "selector"),
    Column("decomposer", "decomposition"),
    Column("asked", "asked for"),
    Column("params_kept", "params kept %", 1, scale=100),
    Column("macs_kept", "MACs kept %", 1, scale=100),
    Column("test_accuracy", "top-1 %", 2, scale=100),
    Column("change_test_accuracy_pp", "Δ top-1 pp", 2, signed=True),
    Column("test_loss", "test loss", 4),
    Column("change_test_loss", "Δ test loss", 4, signed=True),
    Column("published", "published Δ top-1 pp (ALDS)", 2, signed=True),
    Column("verdict", "as published"),
    Column("n", "n"),
)
NOTES = (
    "Mean ± standard deviation (ddof = 1) over the runs; n = training seeds × calibration seeds (pairs: each training "
    "seed with a calibration draw of its own). Δ = compressed − dense. Shares: of the whole model. No fine-tuning; no "
    "selector sees the test split. BatchNorm statistics follow the compression, without labels, where not said to be "
    "kept; a refit fits the factors to the outputs of the dense layers, without labels, and moves the BatchNorm means "
    f"along. The panels of top-1 end {100 * DEEPEST:.0f} pp below the dense net.",
    "Published: ALDS without retraining, a ResNet-20 of another training, 91.39 % dense. The change of its top-1 is "
    f"beside the rows within {100 * NEAR:g} % of its size, and judged where the selector is ALDS with BatchNorm kept.",
    "Loss verified: as few parameters as raise the loss on a verification split, which no gradient comes from, by no "
    "more than what is asked for, with certainty: mean change and two standard errors.",
    "ALDS: Liebenwein et al., arXiv 2107.11442, its numbers as digitised in BALF, arXiv 2509.25136, whose allocation "
    "is the knapsack. ASVD: arXiv 2312.05821.",
)


def build(options: Options) -> list[Path]:
    """Accuracy and loss of every selector at every size, four panels a model, and the table of what is drawn."""
    found = command.load(options)
    runs = _curves(command.runs(options, found, [*frame.SELECTORS, "refitted"]))
    published = _published()
    about = runs.drop_duplicates(["model", "data", "method"])[["model", "data", "method", "curve", "kept", *ABOUT]]
    rows = frame.with_dense(runs, VALUES).merge(about, "left", ["model", "data", "method"])
    rows = pd.concat([_judged(own, published) for _, own in rows.groupby("model", sort=False)])
    origin = command.origin(options, found, [PUBLISHED])
    models = list(dict.fromkeys(rows["model"]))
    with figure.panels(len(models), 4, 3.6, 2.9) as (canvas, axes):
        for index, model in enumerate(models):
            own = rows[rows["model"] == model]
            dense, loss = (float(own[value].iloc[0]) for value in ("test_accuracy", "test_loss"))
            for axis, share in zip(axes[4 * index :], SHARES, strict=False):
                _panel(axis, own, share, "test_accuracy", 100)
                if share == "params_kept":
                    _draw_published(axis, _of(published, own))
                low, high = axis.get_ylim()
                low = min(max(low, 100 * (dense - DEEPEST)), 100 * (dense - LEAST))
                axis.set(ylabel="top-1 (%)", ylim=(low, max(high, 100 * dense + LEAST)))
            for axis, share in zip(axes[4 * index + 2 :], SHARES, strict=False):
                _panel(axis, own, share, "test_loss", 1)
                figure.losses(axis)
                axis.set_ylim(top=max(axis.get_ylim()[1], loss + LEAST))
        figure.legend(canvas, axes)
        pictures = figure.save(canvas, options.name, options.out, origin)
    caption = f"What Figure 4 shows: accuracy and loss without fine-tuning on {', '.join(dict.fromkeys(rows['data']))}"
    notes = [*NOTES, *(_note(rows[rows["model"] == model]) for model in models)]
    shown = Table(options.name, rows, COLUMNS, caption, [note for note in notes if note], "model", KEYS)
    return pictures + table.save([shown], options.out, origin)


def _curves(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with ``variant`` the curve, ``asked`` the point on it and ``method`` both, in the order of the legend.

    Raises ``UserError`` where one curve would be drawn through runs of different settings.
    """
    curves = [_curve(*run) for run in zip(runs["algorithm"], runs["settings"], strict=True)]
    asked = [_asked(settings) for settings in runs["settings"]]
    kept = [
        not CURVES[curve].refits and settings["batch_norm"] == "keep"
        for curve, settings in zip(curves, runs["settings"], strict=True)
    ]
    runs = runs.assign(
        curve=curves,
        kept=kept,
        variant=[CURVES[curve].name + (KEPT if still else "") for curve, still in zip(curves, kept, strict=True)],
        asked=[said for said, _ in asked],
        place=[list(CURVES).index(curve) for curve in curves],
        size=[-value for _, value in asked],
    )
    point = ["model", "data", "variant", "asked"]
    frame.require_one_setting(runs, point, "{variant} at {asked} on {model}, {data}", "Figure 4 has one point")
    runs["method"] = runs["variant"] + ", " + runs["asked"]
    return runs.sort_values(["model", "place", "variant", "size", "first_signature"], kind="stable")


def _curve(algorithm: str, settings: dict[str, Any]) -> str:
    """Return the key in ``CURVES``."""
    if algorithm == "truncation" and settings.get("algorithm.energy") is not None:
        return "energy"
    return "verified" if settings.get("algorithm.max_loss_increase") is not None else algorithm


def _asked(settings: dict[str, Any]) -> tuple[str, float]:
    """What a run was to meet, in words and as a number."""
    given = {key: settings.get(f"algorithm.{key}", settings.get(f"algorithm.selector.{key}")) for key in TARGETS}
    name, value = next((name, value) for name, value in given.items() if value is not None)
    return f"{name.replace('_', ' ')} {value:g}", float(value)


def _published() -> pd.DataFrame:
    """Return one row per published point: model and data by their plain names, share of parameters, top-1, change."""
    known = claims.claims(compare.read_published(PUBLISHED), ["Not retrained"])
    return pd.DataFrame(
        {
            "model": claims.plain(one.model),
            "data": claims.plain(one.data),
            "kept": 1 - one.drop,
            "top1": one.values["original_top1_percent"] + one.values["change_top1_pp"],
            "change": one.values["change_top1_pp"],
            "tolerance": one.tolerances["change_top1_pp"],
        }
        for one in known
    )


def _of(published: pd.DataFrame, own: pd.DataFrame) -> pd.DataFrame:
    """The published points of the net and the data of the rows ``own``."""
    model, data = claims.plain(own["network"].iloc[0]), claims.plain(own["data"].iloc[0])
    return published[(published["model"] == model) & (published["data"] == data)]


def _judged(own: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """The rows of one model with the published change at their size, and for ALDS as published whether it is met."""
    points = _of(published, own)
    changes: list[Any] = []
    verdicts: list[Any] = []
    for _, row in own.iterrows():
        near = points[(points["kept"] - row["params_kept"]).abs() <= NEAR].to_dict(orient="records")
        point: Any = near[0] if near and row["algorithm"] != "dense" else {"change": math.nan}
        changes.append(point["change"])
        same = len(point) > 1 and row["curve"] == "alds" and row["kept"]
        obtained = row["change_test_accuracy_pp"]
        verdicts.append(compare.verdict(point["change"], obtained, point["tolerance"]) if same else None)
    return own.assign(published=changes, verdict=verdicts)


def _panel(axis: Axes, rows: pd.DataFrame, share: str, value: str, scale: float) -> None:
    dense = float(rows[value].iloc[0])
    axis.axhline(scale * dense, color="#000000", linewidth=1, label="dense")
    for key, curve in CURVES.items():
        for kept, line in ((False, "-"), (True, ":")):
            own = rows[(rows["curve"] == key) & (rows["kept"] == kept)].sort_values(share)
            if own.empty:
                continue
            axis.errorbar(
                100 * own[share],
                scale * own[value],
                xerr=100 * own[f"{share}_std"].fillna(0.0),
                yerr=scale * own[f"{value}_std"].fillna(0.0),
                color=curve.colour,
                marker=curve.marker,
                linestyle=line,
                linewidth=1.2,
                markersize=4.5,
                capsize=2,
                label=own["variant"].iloc[0],
            )
    axis.set(title=rows["model"].iloc[0], xlabel=SHARES[share])


def _draw_published(axis: Axes, points: pd.DataFrame) -> None:
    if len(points):
        axis.plot(100 * points["kept"], points["top1"], "k*:", linewidth=0.8, markersize=7, mfc="none", label=ALDS)


def _note(rows: pd.DataFrame) -> str:
    """How joint selection fares, of one model, against what was published for ALDS at the same sizes."""
    ours = rows[(rows["curve"] == "joint") & rows["published"].notna()]
    if ours.empty:
        return ""
    said = [
        f"{number(row['change_test_accuracy_pp'], 2, True)} against {number(row['published'], 2, True)} pp at "
        f"{100 * row['params_kept']:.1f} %"
        for _, row in ours.iterrows()
    ]
    return f"{ours['model'].iloc[0]}, joint against ALDS as published, top-1: {'; '.join(said)}."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script. Return its exit status."""
    return command.run(build, "figure4", "figure4", arguments)


if __name__ == "__main__":
    sys.exit(main())
