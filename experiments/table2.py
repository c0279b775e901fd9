"""Table 2: dense, truncation, lossless and compact on several model families, and the papers' claims about them."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from spectrim.records import records
from spectrim.records.records import Record
from spectrim.report import averages, claims, command, compare, frame, samples
from spectrim.report.command import Options
from spectrim.report.table import Column, Table, number, save

PUBLISHED = Path(__file__).with_name("published.csv")
CLAIMED = ("Abstract", "Table 4", "Table 5", "Table 6")
VALUES = (
    "test_loss",
    "change_test_loss",
    "test_accuracy",
    "change_test_accuracy_pp",
    "params_kept",
    "macs_kept",
    "predicted_change",
    "change_calibration_loss",
)
COLUMNS = (
    Column("model", "model"),
    Column("method", "method"),
    Column("test_loss", "test loss", 4),
    Column("change_test_loss", "Δ test loss", 4, signed=True),
    Column("test_accuracy", "top-1 %", 2, scale=100),
    Column("change_test_accuracy_pp", "Δ top-1 pp", 2, signed=True),
    Column("params_kept", "params kept %", 1, scale=100),
    Column("macs_kept", "MACs kept %", 1, scale=100),
    Column("predicted_change", "predicted Δ loss", 4, signed=True),
    Column("change_calibration_loss", "measured Δ calibration loss", 4, signed=True),
    Column("n", "n"),
    Column("published", "published Δ loss at drop (S1b Table 4)"),
    Column("verdict", "test loss not above dense"),
)
PAPER = ("model", "method", "params_kept", "predicted_change", "change_test_loss", "test_accuracy")
PAPER_NOTE = (
    "Δ = compressed − dense, predicted on the calibration split and measured on the test split. No fine-tuning."
)
CLAIM_COLUMNS = (
    Column("source", "source"),
    Column("published", "published"),
    Column("model", "here"),
    Column("obtained", "obtained here"),
    Column("verdict", "verdict"),
)
SOURCES = (
    "S1: Zhang et al., Lossless Model Compression via Joint Low-Rank Factorization Optimization, arXiv 2412.06867. "
    "S1b: the same authors, Compression for Better, arXiv 2412.06868."
)
NOTES = (
    averages.NOTE,
    "A dense network has one run per training seed. Runs of one training seed share a checkpoint, so with n = 1 × 3 "
    "the deviation is that of the calibration draw.",
    "Δ = compressed − dense. Params and MACs kept count the whole model. Predicted is the first-order change of the "
    "calibration loss, summed over the layers; the measured change stands beside it. Calibration and verification "
    "images are held out of the training data. No selector sees the test split. There is no fine-tuning.",
    "Published numbers are those of ImageNet networks of the same family, on the split that S1b also calibrates on. "
    "S1b does not define its drop. Data set and scale differ, so the verdict is on the claim alone: the loss is not "
    "above the original's.",
)
CLAIM_NOTES = (
    "Unless the data are ImageNet, data set and scale differ from the source's. The verdict is then on the claim "
    "alone: the compressed loss is not above the original's at the published drop. The drop is read as the share of "
    "parameters removed from the whole model.",
    "The reading favours the claim: one lossless or compact row of a model is enough, if its mean test loss meets it.",
)
OWN_WEIGHTS = "table12"  # the experiment with a network of the papers and its ImageNet weights
OWN_NOTE = (
    "Its own weights, 20 images: the claimed network with ImageNet weights, calibrated and judged on the same images. "
    "± is the standard error over the images."
)


def build(options: Options) -> list[Path]:
    """Build Table 2 and the table of its claims."""
    found = command.load(options)
    runs = command.runs(options, found, frame.METHODS)
    published = compare.read_published(PUBLISHED)
    rows = averages.with_dense(runs, VALUES)
    rows["published"] = [_published(published, row) for _, row in rows.iterrows()]
    rows["verdict"] = claims.loss_verdicts(rows, frame.METHODS)
    models, data = list(dict.fromkeys(rows["model"])), frame.data_of(rows)
    caption = f"Loss and accuracy without fine-tuning on {data}"
    table = Table(
        options.name,
        rows,
        COLUMNS,
        caption,
        [*NOTES, *_unverified(rows), SOURCES, *frame.missing(models)],
        group="model",
        hidden=frame.KEYS,
    )
    beside = records.read_all(options.records, OWN_WEIGHTS) if options.default else []
    own = _own_weights(beside)
    judged = Table(
        f"{options.name}_claims",
        _claims(published, rows, own),
        CLAIM_COLUMNS,
        f"Claims, tested on {data}",
        [SOURCES, *CLAIM_NOTES, *([] if own.empty else [OWN_NOTE])],
    )
    # Of the truncations an excerpt has the mildest one.
    mildest = rows["params_kept"] == rows.groupby(["model", "algorithm"])["params_kept"].transform("max")
    excerpt = table.paper(PAPER, (rows["algorithm"] != "truncation") | mildest, [PAPER_NOTE, averages.seeds_note(rows)])
    return save([table, excerpt, judged], options.out, command.origin(options, [*found, *beside], [PUBLISHED]))


def _own_weights(found: Sequence[Record]) -> pd.DataFrame:
    """Return the rows of the networks with ImageNet weights, with the standard error of the change of the loss."""
    runs = frame.runs(found)
    if runs.empty:
        return runs
    runs = runs[runs["algorithm"].isin(claims.PROMISING)].merge(samples.measures(found), on="signature")
    return averages.with_dense(runs, (*VALUES, "error"))


def _unverified(rows: pd.DataFrame) -> list[str]:
    """Return a note that names the models without a verified run, if other models have one."""
    verified = rows[rows["mode"] == "verified"]["model"]
    without = [model for model in dict.fromkeys(rows["model"]) if model not in set(verified)]
    return (
        [f"Verified selection, which takes longest on deep networks, was not run on: {', '.join(without)}."]
        if without
        else []
    )


def _published(published: pd.DataFrame, row: "pd.Series[Any]") -> str | None:
    """Return the published changes of loss of the model's family, for the rows of the papers' selectors."""
    if row["algorithm"] not in claims.PROMISING:
        return None
    said = []
    for claim in claims.claims(published, ["Table 4"]):
        if frame.family(claim.model) == frame.family(row["network"]):
            said.append(f"{claim.model} {number(claim.change, 4, True)} at {100 * claim.drop:.0f} %")
    return "; ".join(said) or None


def _claims(published: pd.DataFrame, rows: pd.DataFrame, own_weights: pd.DataFrame) -> pd.DataFrame:
    """Return one row per claim of S1 and S1b about compressed networks and per model of its family.

    ``own_weights``: rows of networks with ImageNet weights. The claims about them get a row more.
    """
    found = []
    for claim in claims.claims(published, CLAIMED):
        family = rows[[frame.family(name) == frame.family(claim.model) for name in rows["network"]]]
        promising = family[family["algorithm"].isin(claims.PROMISING)]
        for model in list(dict.fromkeys(promising["model"])) or [None]:
            found.append(_claim(claim, family[family["model"] == model], model))
        if len(own_weights):
            same = own_weights[[claims.plain(name) == claims.plain(claim.model) for name in own_weights["network"]]]
            for model in dict.fromkeys(same["model"]):
                named = f"{model}, its own weights, 20 images, leakage in its favour"
                found.append(_claim(claim, same[same["model"] == model], named))
    return pd.DataFrame(found)


def _claim(claim: claims.Claim, rows: pd.DataFrame, named: str | None) -> dict[str, Any]:
    """Return the row of one claim and one model. ``rows``: those of the model. ``named``: the model, for the reader."""
    ours, dense = rows[rows["algorithm"].isin(claims.PROMISING)], rows[rows["algorithm"] == "dense"]
    judged = claims.judge(claim, ours, dense)
    return {
        "claim": claim.name,
        "source": claim.source,
        "published": claim.said,
        "model": named,
        "obtained": judged.why,
        "verdict": judged.word,
        "records": averages.records_of(pd.concat([dense, ours])["records"]),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script. Return its exit status."""
    return command.run(build, "table2", "table2", arguments)


if __name__ == "__main__":
    sys.exit(main())
