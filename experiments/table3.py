"""Table 3: perplexity, accuracy and loss of language models under the published algorithms, their rivals and ours."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import table3_aims

from spectrim.records.records import CLASS, Record
from spectrim.report import averages, claims, command, compare, frame
from spectrim.report.command import Options
from spectrim.report.table import Column, Table, save

PUBLISHED = Path(__file__).with_name("published.csv")
# What a run is, as a key, and what the table calls it. The order is that of the rows.
KINDS = {
    "truncation": "truncation, uniform ratio",
    "whitened": "whitened SVD, uniform ratio",
    "whitened_pivoted": "whitened SVD, uniform ratio, pivoted",
    "knapsack_pivoted": "knapsack (BALF), pivoted",
    "svdllmv2_pivoted": "SVD-LLM V2, pivoted",
    "zerosum_pivoted": "ZS-SVD, pivoted",
    "lems_pivoted": "LEMS, both sides whitened, pivoted",
    "lossless": "lossless",
    "compact": "compact",
    "rankselection": "rank selection",
    "joint": "joint, ours",
    "refitted": "joint, ours, refitted",
    "curvature": "joint, ours, no first order",
    "interaction": "joint, ours, interaction",
    "joint_pivoted": "joint, ours, pivoted",
    "refitted_pivoted": "joint, ours, pivoted, refitted",
    "two_sided": "joint, ours, both sides whitened",
    "two_sided_pivoted": "joint, ours, both sides whitened, pivoted",
    "two_sided_embedding_pivoted": "joint, ours, both sides whitened, embedding too, pivoted",
    "two_sided_own_text_pivoted": "joint, ours, both sides whitened, own text too, pivoted",
    "two_sided_less_text_pivoted": "joint, ours, both sides whitened, a quarter of the text, pivoted",
    "two_sided_more_text_pivoted": "joint, ours, both sides whitened, four times the text, pivoted",
    "two_sided_more_text_auto_pivoted": "joint, ours, both sides whitened, four times the text, slopes auto, pivoted",
    "two_sided_refitted": "joint, ours, both sides whitened, refitted",
    "two_sided_refitted_pivoted": "joint, ours, both sides whitened, pivoted, refitted",
}
TEXTS = {16: "_less_text", 256: "_more_text"}  # calibration blocks, in place of 64
DRAWS = 3  # calibration draws of every grid; a row with fewer says so
OURS = ("lossless", "compact", "rankselection", "joint")  # of the two sources, and the selector of this project
ALGORITHMS = ("truncation", "knapsack", "svdllmv2", "zerosum", "lems", *OURS)
PAPER = ("net", "method", "params_kept", "perplexity", "test_accuracy")
ABOUT = ("algorithm", "kind", "embedding", "requested")  # columns that the code reads and the table prints as method
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
    averages.NOTE,
    "Δ = compressed − dense. Losses are in nats; those of language models are per token. Perplexity is the "
    "exponential of that loss, and rise is its increase over the dense model's. The first perplexity is that of the "
    "corpus of the calibration data, on other documents. Params and MACs kept count the whole model. Embeddings have "
    "parameters but no MACs. There is no fine-tuning, and no selector sees a test split.",
    "Uniform ratio: every layer keeps the same share of its parameters. Whitened: each layer is weighed by the second "
    "moment of its inputs on the calibration data, as in SVD-LLM (arXiv 2403.07378), without its update of the "
    "weights.",
    "Refitted: layer by layer, least squares fits the factors to the outputs of the dense layers, without labels. The "
    "inputs are those of the compressed model. No first order: the Fisher information alone; the other rows also use "
    "slopes that are beyond chance. Interaction: the effects of removed components on each other are included, from "
    "more samples.",
    "Embedding too: the rows of frequent tokens stay as they are. The rows of all other tokens are factored, each "
    "weighed by how often its token occurs. In all other rows the embedding stays dense.",
    "Knapsack (BALF), SVD-LLM V2, ZS-SVD, LEMS: the ranks by these papers, in the code of this project. "
    "docs/algorithms.md says what is left out. LEMS measures each layer on one batch of 8 blocks, for time.",
    "Published rows are as printed in S1b for BERT, at a drop that it does not define. Nothing of it was run here. "
    "Top-1 of SQuAD is exact match.",
    "S1b: Zhang et al., Compression for Better, arXiv 2412.06868.",
)

PIVOTED = (
    "Pivoted: at rank k a layer stores k rows of its weight and the coefficients of the other rows, k (O + I - k) "
    "numbers instead of k (O + I). Both sides whitened: by the inputs, and by the gradients at the outputs (K-FAC). "
    "Own text too: the calibration has as many blocks again that the model wrote itself."
)


def build(options: Options) -> list[Path]:
    """Build Table 3."""
    found = command.load(options)
    runs = described(command.runs(options, found, ALGORITHMS))
    others = add_perplexities(runs, found)
    values = [*VALUES, "perplexity", "rise", *(f"{what}_{name}" for name in others for what in ("perplexity", "rise"))]
    rows = averages.over_seeds(pd.concat([_dense(runs, values), runs]), ("model", "data", "method", *ABOUT), values)
    rows["order"] = (rows["model"] + rows["data"]).map({key: at for at, key in enumerate(runs["model"] + runs["data"])})
    rows = rows.sort_values("order", kind="stable", ignore_index=True).drop(columns="order")
    rows.loc[rows["algorithm"] == "dense", [f"{value}_std" for value in KEPT]] = math.nan
    rows["net"] = rows["model"] + ", " + rows["data"]
    rows["verdict"] = claims.loss_verdicts(rows)
    published = compare.read_published(PUBLISHED)
    forms = [PIVOTED] if rows["kind"].str.endswith("_pivoted").any() else []
    aims = table3_aims.said(rows, runs, others, KINDS)
    few = (rows["runs"] < DRAWS) & ~rows["kind"].isin(["dense", "truncation"])  # which read no calibration data
    rows.loc[few, "method"] += ", draws: " + rows["runs"].astype(str)
    table = Table(
        options.name,
        pd.concat([rows, pd.DataFrame(_published(published))], ignore_index=True),
        [*COLUMNS, *_elsewhere(others), *LAST],
        "Language models without fine-tuning",
        [*NOTES, *forms, *_data(found), *_claims(published, rows), *aims],
        group="net",
        hidden=ABOUT,
    )
    factored = (rows["params_kept"] < 1) | (rows["algorithm"] == "dense")
    shown = factored & (rows["requested"].isna() | (rows["requested"] == table3_aims.AIMED))
    keys = [*PAPER[:-1], *(f"perplexity_{name}" for name in others[:1]), PAPER[-1]]
    notes = ["No fine-tuning.", averages.seeds_note(rows, "net")]
    excerpt = table.paper(keys, shown.reindex(table.data.index, fill_value=False), notes)
    return save([table, excerpt], options.out, command.origin(options, found, [PUBLISHED]))


def described(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs with the columns ``ABOUT`` and with their printed ``method``, in the order of the rows.

    Raises ``UserError`` where runs of different settings would share one row.
    """
    settings = runs["settings"]
    runs = runs.assign(
        kind=[_kind(row) for _, row in runs.iterrows()],
        embedding=[bool(one.get("decomposer.embeddings")) for one in settings],
        requested=[math.nan if (kept := one.get("algorithm.params_kept")) is None else kept for one in settings],
        parameter=[one.get("algorithm.epsilon", one.get("algorithm.gamma")) for one in settings],
    )
    runs["method"] = [_method(row) for _, row in runs.iterrows()]
    frame.require_one_setting(runs, ["model", "data", "method"], "{method} of {model} on {data}", "Table 3 has one row")
    order = ["model", "data", "place", "embedding", "size", "parameter", "first_signature"]
    placed = runs.assign(place=runs["kind"].map(list(KINDS).index), size=-runs["requested"])
    return placed.sort_values(order, kind="stable")


def _kind(row: "pd.Series[Any]") -> str:
    """Return the key in ``KINDS``. A joint selection is named by the one setting in which it differs."""
    settings = row["settings"]
    base = "decomposer.base" if f"decomposer.base.{CLASS}" in settings else "decomposer"  # of the better view
    pivoted = "_pivoted" if settings.get(f"{base}.factors") == "pivoted" else ""
    if row["algorithm"] == "truncation":
        return f"whitened{pivoted}" if settings[f"{base}.{CLASS}"] == "WhitenedSVD" else "truncation"
    if row["algorithm"] != "joint":
        return f"{row['algorithm']}{pivoted}"
    if settings[f"{base}.{CLASS}"] == "TwoSidedSVD":
        return f"{_two_sided(settings)}{'_embedding' if settings.get(f'{base}.embeddings') else ''}{pivoted}"
    if settings.get("algorithm.refit"):
        return f"refitted{pivoted}"
    if pivoted:
        return "joint_pivoted"
    if settings.get("algorithm.interaction"):
        return "interaction"
    return "curvature" if settings.get("algorithm.significance", 0) is None else "joint"


def _two_sided(settings: Mapping[str, Any]) -> str:
    text = "_own_text" if settings.get("data.own_text") else TEXTS.get(settings.get("data.calibration_size", 0), "")
    auto = "_auto" if settings.get("algorithm.significance") == "auto" else ""
    return f"two_sided{text}{auto}{'_refitted' if settings.get('algorithm.refit') else ''}"


def _method(row: "pd.Series[Any]") -> str:
    """Return what the table prints for a run."""
    by_loss = "refitted" in row["kind"] and frame.setting(row["settings"], "algorithm.refit_by") == "loss"
    parts = [KINDS[row["kind"]], row["mode"], "by the loss" if by_loss else ""]
    parts.append("embedding too" if row["embedding"] else "")
    if row["algorithm"] == "rankselection":
        parts.append(f"ε {row['parameter']:g}")
    elif row["algorithm"] in claims.PROMISING:
        parts.append("no gamma" if pd.isna(row["parameter"]) else f"gamma {row['parameter']:g}")
    if not math.isnan(row["requested"]):
        parts.append(f"{100 * row['requested']:g} % of the parameters")
    return ", ".join(filter(None, parts))


def _elsewhere(others: Sequence[str]) -> list[Column]:
    """Return the columns of the corpora that calibration is not drawn from."""
    return [
        column
        for name in others
        for column in (
            Column(f"perplexity_{name}", f"perplexity, {name}", 2),
            Column(f"rise_{name}", f"rise %, {name}", 1, signed=True),
        )
    ]


def add_perplexities(runs: pd.DataFrame, found: Sequence[Record]) -> list[str]:
    """Add the perplexities and their rise in percent as columns. Return the names of the other corpora."""
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
    """Return the loss per token on the test split, or on that of the ``other`` corpus; NaN if there is none."""
    measured = net.get("also", {}).get(other) if other else net["test"]
    return math.nan if measured is None or measured["accuracy"] is not None else float(measured["loss"])


def _dense(runs: pd.DataFrame, values: Sequence[str]) -> pd.DataFrame:
    dense = runs.drop_duplicates(["model", "data", "seed"]).assign(
        method="dense", algorithm="dense", kind="dense", embedding=False, requested=math.nan,
        calibration_seed=None, params_kept=1.0, macs_kept=1.0,
    )  # fmt: skip
    for value in values:
        if value.startswith(("test", "perplexity")):
            dense[value] = dense[f"dense_{value}"]
        elif value not in KEPT:
            dense[value] = math.nan
    return dense


def _published(published: pd.DataFrame) -> list[dict[str, Any]]:
    """Return S1b's rows about BERT: the original, lossless and plain SVD."""
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
    """Return what the runs say about their data: context and numbers of tokens. It is the first note of a record."""
    said = dict.fromkeys(record["notes"][0] for record in found if record["notes"])
    return [f"Data: {one}." for one in said]


def _claims(published: pd.DataFrame, rows: pd.DataFrame) -> list[str]:
    """Judge, for each model, S1b's claim that the loss is not above the original's at their drop."""
    drop = max(claim.drop for claim in claims.claims(published, ["Table 5"]))
    said = []
    for net, own in rows.groupby("net", sort=False):
        judged = claims.lossless_claim(own[own["algorithm"].isin(claims.PROMISING)], drop)
        said.append(f"{net}: S1b Table 5 (loss not above the original's at a drop of {100 * drop:.0f} %) {judged}.")
    return said


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script. Return its exit status."""
    return command.run(build, "table3", "table3", arguments)


if __name__ == "__main__":
    sys.exit(main())
