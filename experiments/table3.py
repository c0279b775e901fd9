"""Table 3: language models, by the published algorithms, their rivals and ours: perplexity, accuracy, loss."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from spectrim.records.records import Record
from spectrim.report import claims, command, compare, frame
from spectrim.report.command import Options
from spectrim.report.table import Column, Table, number, save

PUBLISHED = Path(__file__).with_name("published.csv")
WHITENED, JOINT, REFITTED = "whitened SVD, uniform ratio", "joint, ours", "joint, ours, refitted"
CURVED, TOGETHER = "joint, ours, no first order", "joint, ours, interaction"
WITH_EMBEDDING = ", embedding too"
UPON = (WHITENED, WHITENED + WITH_EMBEDDING, JOINT + WITH_EMBEDDING, REFITTED, CURVED, TOGETHER)
ALGORITHMS = ("truncation", "lossless", "compact", "rankselection", "joint")
OURS = ("lossless", "compact")  # those that promise the loss of the dense net
AIMED, HALF, POINTS = 0.8, 0.5, 0.2  # parameters kept; part of the rise of whitened SVD; percentage points
KEPT = ("params_kept", "macs_kept")
VALUES = (*KEPT, "test_loss", "change_test_loss", "test_accuracy", "change_test_accuracy_pp")
COLUMNS = (
    Column("net", "model, data"),
    Column("method", "method"),
    Column("params_kept", "params kept %", 1, scale=100),
    Column("macs_kept", "MACs kept %", 1, scale=100),
    Column("test_loss", "test loss", 4),
    Column("change_test_loss", "Δ test loss", 4, signed=True),
    Column("perplexity", "perplexity", 2),
    Column("rise", "rise %", 1, signed=True),
)
LAST = (
    Column("test_accuracy", "top-1 %", 2, scale=100),
    Column("change_test_accuracy_pp", "Δ top-1 pp", 2, signed=True),
    Column("n", "n"),
    Column("verdict", "test loss not above dense"),
)
NOTES = (
    "Mean ± standard deviation (ddof = 1) over the runs; n = training seeds × calibration seeds. Δ = compressed − "
    "dense; losses in nats, of a language model a token. Perplexity: exp of that loss; rise: over the dense model's. "
    "The first perplexity is of the corpus that calibration is drawn from (other documents), the next of another "
    "corpus. Params and MACs kept: of the whole model; embeddings are parameters, but multiply nothing. No "
    "fine-tuning; no selector sees a test split.",
    "Uniform ratio: every layer keeps the same part of its parameters. Whitened: by the second moment of the layer's "
    "inputs on the calibration data, as in SVD-LLM (arXiv 2403.07378), without its update of the weights after. "
    "Refitted: layer by layer the factors are fitted, by least squares and without labels, to what the dense layers "
    "put out, from the inputs that the compressed model really has. No first order: by the Fisher information alone, "
    "where the others take a slope of four standard errors and more. Interaction: with what removed components do to "
    "one another, of a thousand samples where the others take half. Embedding too: the rows of the tokens that make "
    "nine tenths of the calibration data stay as they are, and those of all others are factored, weighed by how often "
    "each comes; elsewhere the embedding stays dense.",
    "Published: as printed in the source for BERT, at its own drop, which it does not define; nothing of it was run "
    "here. Top-1 of SQuAD is exact match.",
    "S1b: Zhang et al., Compression for Better, arXiv 2412.06868.",
)


def build(options: Options) -> list[Path]:
    """Table 3, from the records of its grids."""
    found = command.load(options)
    runs = command.runs(options, found, ALGORITHMS)
    runs["method"] = [_method(row) for _, row in runs.iterrows()]
    row = ["model", "data", "method"]
    frame.require_one_setting(runs, row, "{method} of {model} on {data}", "Table 3 has one row")
    others = _add_perplexities(runs, found)
    runs["place"] = [_place(row) for _, row in runs.iterrows()]
    runs = runs.sort_values(["model", "data", "place", "first_signature"], kind="stable")
    values = [*VALUES, "perplexity", "rise", *(f"{what}_{name}" for name in others for what in ("perplexity", "rise"))]
    rows = frame.over_seeds(pd.concat([_dense(runs, values), runs]), ("model", "data", "method"), values)
    rows["order"] = (rows["model"] + rows["data"]).map({key: at for at, key in enumerate(runs["model"] + runs["data"])})
    rows = rows.sort_values("order", kind="stable").drop(columns="order")
    rows.loc[rows["method"] == "dense", [f"{value}_std" for value in KEPT]] = math.nan
    rows["net"], rows["verdict"] = rows["model"] + ", " + rows["data"], [_verdict(row) for _, row in rows.iterrows()]
    published = compare.read_published(PUBLISHED)
    elsewhere = [
        column
        for name in others
        for column in (
            Column(f"perplexity_{name}", f"perplexity, {name}", 2),
            Column(f"rise_{name}", f"rise %, {name}", 1, signed=True),
        )
    ]
    table = Table(
        options.name,
        pd.concat([rows, pd.DataFrame(_published(published))], ignore_index=True),
        [*COLUMNS, *elsewhere, *LAST],
        "Language models without fine-tuning",
        [*NOTES, *_data(found), *_claims(published, rows), *_aims(rows, others)],
        group="net",
    )
    return save([table], options.out, command.origin(options, found, [PUBLISHED]))


def _method(row: "pd.Series[Any]") -> str:
    settings = row["settings"]
    kept = settings.get("algorithm.params_kept")
    at = "" if kept is None else f", {100 * kept:g} % of the parameters"
    too = WITH_EMBEDDING if settings.get("decomposer.embeddings") else ""
    if row["algorithm"] == "truncation":
        return (WHITENED if str(row["decomposer"]).startswith("whitened") else "truncation, uniform ratio") + too + at
    if row["algorithm"] == "joint":
        return _joint(settings) + too + at
    if row["algorithm"] == "rankselection":
        return f"rank selection, ε {settings['algorithm.epsilon']:g}"
    gamma = settings.get("algorithm.gamma")
    return f"{row['variant']}, " + ("no gamma" if gamma is None else f"gamma {gamma:g}")


def _joint(settings: Mapping[str, Any]) -> str:
    """Which joint selection it is: the one that the others differ from in one thing, or what it differs in."""
    if settings.get("algorithm.refit"):
        return REFITTED
    if settings.get("algorithm.interaction"):
        return TOGETHER
    return CURVED if settings.get("algorithm.significance", 0) is None else JOINT


def _place(row: "pd.Series[Any]") -> tuple[int, int, float, str]:
    """Where a row stands: by the algorithm, then what is built upon it, the larger model first."""
    kept = row["settings"].get("algorithm.params_kept")
    later = [place for place, name in enumerate(UPON, 1) if row["method"].startswith(name)]
    return ALGORITHMS.index(row["algorithm"]), max(later, default=0), -(kept or 0.0), row["method"]


def _add_perplexities(runs: pd.DataFrame, found: Sequence[Record]) -> list[str]:
    """Perplexities and their rise in percent as columns, also of the other corpora, whose names are returned."""
    of = {record["signature"]: record for record in found}
    others = sorted({name for record in of.values() for name in record["dense"].get("also", {})})
    for name in ["", *others]:
        losses = [[_token_loss(of[run][net], name) for net in ("dense", "compressed")] for run in runs["signature"]]
        tail = f"_{name}" if name else ""
        runs[f"dense_perplexity{tail}"] = [math.exp(before) for before, _ in losses]
        runs[f"perplexity{tail}"] = [math.exp(after) for _, after in losses]
        runs[f"rise{tail}"] = [100 * math.expm1(after - before) for before, after in losses]
    return others


def _token_loss(net: dict[str, Any], other: str) -> float:
    """The loss a token on the test split, or on that of the ``other`` corpus; NaN where there is none."""
    measured = net.get("also", {}).get(other) if other else net["test"]
    return math.nan if measured is None or measured["accuracy"] is not None else float(measured["loss"])


def _dense(runs: pd.DataFrame, values: Sequence[str]) -> pd.DataFrame:
    dense = runs.drop_duplicates(["model", "data", "seed"]).assign(
        method="dense", calibration_seed=None, params_kept=1.0, macs_kept=1.0
    )
    for value in values:
        if value.startswith(("test", "perplexity")):
            dense[value] = dense[f"dense_{value}"]
        elif value not in KEPT:
            dense[value] = math.nan
    return dense


def _verdict(row: "pd.Series[Any]") -> str | None:
    if not row["method"].startswith(OURS):
        return None
    if row["params_kept"] >= 1:
        return "not comparable: nothing was factored"
    return "holds" if row["change_test_loss"] <= 0 else "does not hold"


def _published(published: pd.DataFrame) -> list[dict[str, Any]]:
    """S1b's rows of BERT: the original, theirs and plain SVD."""
    rows = []
    for claim in claims.claims(published, ["Table 5"]):
        for name, method in (("original", "original"), ("compressed", "lossless (S1b)"), ("plain_svd", "plain SVD")):
            right = claim.values.get(f"{name}_exact_match_percent", claim.values.get(f"{name}_accuracy_percent"))
            before = claim.values.get("original_exact_match_percent", claim.values.get("original_accuracy_percent"))
            assert right is not None and before is not None, f"{PUBLISHED} has no accuracy of {claim.name}"
            f1 = claim.values.get(f"{name}_f1_percent")
            loss = claim.values.get(f"{name}_loss", math.nan)
            first = name == "original"
            rows.append(
                {
                    "net": f"{claim.model}, {claim.data}, published ({claim.source})",
                    "method": method + ("" if f1 is None else f", F1 {f1:g} %"),
                    "params_kept": 1.0 if first else 1 - claim.drop,
                    "test_loss": loss,
                    "change_test_loss": math.nan if first else loss - claim.values.get("original_loss", math.nan),
                    "test_accuracy": right / 100,
                    "change_test_accuracy_pp": math.nan if first else right - before,
                }
            )
    return rows


def _data(found: Sequence[Record]) -> list[str]:
    """What the runs say of their data: context, counts of tokens."""
    said = dict.fromkeys(record["notes"][0] for record in found if record["notes"] and " tokens" in record["notes"][0])
    return [f"Data: {one}." for one in said]


def _claims(published: pd.DataFrame, rows: pd.DataFrame) -> list[str]:
    """S1b's claim, read on each of our models: the loss is not above the original's at their drop."""
    drop = max(claim.drop for claim in claims.claims(published, ["Table 5"]))
    said = []
    for net, own in rows.groupby("net", sort=False):
        judged = claims.lossless_claim(own[own["method"].str.startswith(OURS)], drop)
        said.append(f"{net}: S1b Table 5 (loss not above the original's at a drop of {100 * drop:.0f} %) {judged}.")
    return said


def _aims(rows: pd.DataFrame, others: Sequence[str]) -> list[str]:
    """What this project aims at with a fifth of the parameters gone, and which of its selections get there."""
    at, said = f", {100 * AIMED:g} % of the parameters", []
    for net, own in rows.groupby("net", sort=False):
        of = own.set_index("method")
        for name in (JOINT, JOINT + WITH_EMBEDDING, REFITTED):
            if name + at not in of.index:
                continue
            ours: Any = of.loc[name + at]
            if not math.isnan(ours["test_accuracy"]):
                word = "met" if ours["change_test_accuracy_pp"] >= -POINTS else "not met"
                change = number(ours["change_test_accuracy_pp"], 2, True)
                aim = f"the aim, within {POINTS:g} pp of dense at {100 * AIMED:g} %"
                said.append(f"{net}: {aim}, is {word}: {change} pp ({name}).")
            elif WHITENED + at in of.index:
                whitened = of.loc[WHITENED + at]
                part = ours["rise"] / whitened["rise"]
                word = "met" if part <= HALF else "not met"
                parts = (f", {ours[f'rise_{other}'] / whitened[f'rise_{other}']:.2f} on {other}" for other in others)
                aim = f"at {100 * AIMED:g} % at most {HALF:g} of the rise of whitened SVD at a uniform ratio"
                said.append(f"{net}: the aim, {aim}, is {word}: {part:.2f}{''.join(parts)} ({name}).")
    return said


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of the script; the exit status."""
    return command.run(build, "table3", "table3", arguments)


if __name__ == "__main__":
    sys.exit(main())
