"""Table 12: ResNet-50 and EfficientNet-lite0 with ImageNet weights, calibrated and judged on the same 20 images."""

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from spectrim.report import averages, claims, command, compare, frame, samples
from spectrim.report.command import Options
from spectrim.report.table import Column, Table, number, save

PUBLISHED = Path(__file__).with_name("published.csv")
CLAIM = "s1b-table4-resnet50"
SELECTORS = {
    ("lossless", "one-shot"): "lossless, one-shot",
    ("lossless", "verified"): "lossless, verified",
    ("compact", "one-shot"): "compact, one-shot",
    ("compact", "verified"): "compact, verified",
    ("truncation", ""): "uniform truncation",
    ("joint", ""): "joint, ours",
}
SAMPLES = ("error", "lowered", "divergence", "same_answer")
VALUES = (
    "params_kept",
    "macs_kept",
    "predicted_change",
    "test_loss",
    "change_test_loss",
    "test_accuracy",
    *SAMPLES,
)
COLUMNS = (
    Column("model", "model"),
    Column("method", "method"),
    Column("params_kept", "params kept %", 1, scale=100),
    Column("macs_kept", "MACs kept %", 1, scale=100),
    Column("predicted_change", "predicted Δ loss", 4, signed=True),
    Column("test_loss", "loss", 4),
    Column("change_test_loss", "Δ loss", 4, signed=True),
    Column("error", "error of Δ", 4),
    Column("lowered", "images whose loss fell", 0),
    Column("test_accuracy", "top-1 %", 0, scale=100),
    Column("divergence", "KL elsewhere", 4),
    Column("same_answer", "same answer elsewhere %", 1, scale=100),
    Column("verdict", "loss not above dense"),
)
PAPER = ("method", "params_kept", "change_test_loss", "error", "test_accuracy", "divergence")
REACH_COLUMNS = (
    Column("model", "model"),
    Column("selector", "selector"),
    Column("lowest", "lowest Δ loss at the published drop or more"),
    Column("furthest", "largest drop with a loss not above the dense one's"),
)
NOTES = (
    "The 20 images are the calibration split and the test split at once, which favours the selector. A verified "
    "selection measures the loss of the same images after each layer. There is no fine-tuning.",
    "Δ = compressed − dense, the mean over the 20 images. The error of Δ is the standard error of the mean of the 20 "
    "differences, each of one image. Predicted is the first-order change, summed over the layers.",
    "Elsewhere: 200 test images of CIFAR-10, enlarged to 128 x 128 pixels. They are natural images that neither the "
    "training nor the selection has seen. KL is the mean divergence from the dense network's predictions, in nats; no "
    "label is read.",
    "One run a row: the networks have one training, and 20 images allow one calibration draw. The verified selection "
    "tries one rank a layer.",
)
REACH_NOTE = (
    "± is the standard error over the images. Of each selector the best run on the reported images is taken, which "
    "favours it once more. The published drop, {drop:.0f} %, is that of ResNet-50 in S1b (arXiv 2412.06868, Table 4)."
)


def build(options: Options) -> list[Path]:
    """Build Table 12, and the table of how far each selector gets."""
    found = command.load(options)
    runs = command.runs(options, found, [*frame.METHODS, "joint"]).merge(samples.measures(found), on="signature")
    frame.require_one_setting(runs, ["model", "data", "method"], "{method} on {model}, {data}", "a row has one setting")
    rows = averages.with_dense(runs, VALUES)
    rows.loc[rows["algorithm"] == "dense", list(SAMPLES)] = math.nan
    rows["verdict"] = claims.loss_verdicts(rows, [*frame.METHODS, "joint"])
    drop = next(one.drop for one in claims.claims(compare.read_published(PUBLISHED)) if one.name == CLAIM)
    data = frame.data_of(rows)
    caption = f"ImageNet weights, calibrated and judged on the same images: {data}"
    table = Table(options.name, rows, COLUMNS, caption, NOTES, group="model", hidden=frame.KEYS)
    papers = [
        replace(
            table.paper(PAPER, rows["model"] == model, NOTES[1:3]),
            name=f"{options.name}_paper_{model}",
            caption=f"{model}: {caption}",
        )
        for model in dict.fromkeys(rows["model"])
    ]
    reach = Table(
        f"{options.name}_reach",
        _reach(rows, drop),
        REACH_COLUMNS,
        f"How far each selector gets on the images that it was calibrated on: {data}",
        [REACH_NOTE.format(drop=100 * drop)],
        group="model",
    )
    return save([table, *papers, reach], options.out, command.origin(options, found, [PUBLISHED]))


def _reach(rows: pd.DataFrame, drop: float) -> pd.DataFrame:
    """Return one row per model and selector: its lowest loss at a drop, and its largest drop at the dense loss."""
    found = []
    for model, of_model in rows.groupby("model", sort=False):
        for key, selector in SELECTORS.items():
            own = of_model[[(row["algorithm"], row["mode"]) == key for _, row in of_model.iterrows()]]
            removed = 1 - own["params_kept"]
            enough, kept = own[removed >= drop - 1e-3], own[(removed > 0) & (own["change_test_loss"] <= 0)]
            if len(own):
                found.append(
                    {
                        "model": model,
                        "selector": selector,
                        "lowest": _said(enough, enough["change_test_loss"]),
                        "furthest": _said(kept, kept["params_kept"]),
                        "records": averages.records_of(own["records"]),
                    }
                )
    return pd.DataFrame(found)


def _said(rows: pd.DataFrame, by: "pd.Series[Any]") -> str:
    """Return change, drop and setting of the row with the smallest value of ``by``."""
    if rows.empty:
        return "none"
    row = rows.iloc[int(by.argmin())]
    change = f"{number(float(row['change_test_loss']), 4, True)} ± {row['error']:.4f}"
    return f"{change} at a drop of {100 * (1 - row['params_kept']):.1f} % ({row['method']})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script. Return its exit status."""
    return command.run(build, "table12", "table12", arguments)


if __name__ == "__main__":
    sys.exit(main())
