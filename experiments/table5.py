"""Table 5: SVD training with rank selection (S2) against training first and truncating after, at what was published."""

import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from spectrim.errors import UserError
from spectrim.records.records import Record, class_of
from spectrim.report import command, compare, frame, trainings
from spectrim.report.command import Options
from spectrim.report.table import Column, Table, save

PUBLISHED = Path(__file__).with_name("published.csv")
KINDS = ("SVDTraining", "FineTuning", "RankSelection", "GlobalThreshold", "Truncation")
VALUES = ("params_kept", "test_accuracy", "change_pp", "test_loss", "seconds")
COLUMNS = (
    Column("net", "net, data"),
    Column("method", "method"),
    Column("epochs", "epochs", 0),
    Column("params_kept", "params kept %", 2, scale=100),
    Column("test_accuracy", "top-1 %", 2, scale=100),
    Column("change_pp", "Δ top-1 to dense pp", 2, signed=True),
    Column("test_loss", "test loss", 4),
    Column("seconds", "seconds", 0),
    Column("n", "n"),
)
NOTES = (
    "Mean ± standard deviation (ddof = 1) over training seeds; n = training seeds × calibration seeds. Params kept: of "
    "the whole model. Δ: to the dense net of the same seed, which the rows from a trained net start from. Epochs: of "
    "training beyond that net, or in all where from scratch. Seconds: of compression, training included, on one core; "
    "none where a GPU trained several nets at a time.",
    "SVD training: U, S and V are trained, and after each epoch but the last few cut as far as the loss on the "
    "training images moves by less than ε. Rows of other methods were asked for a budget near what that left. Steps as "
    "printed: without the bound on how far a step on a factor moves its layer, at the learning rate that this needs. "
    "Cuts: epochs at whose end ranks were selected. Priced: energy weighed against the parameters that it costs. "
    "Spatial: convolutions as two of kh x 1 and 1 x kw; otherwise as kh x kw and 1 x 1.",
    "Published rows: as printed in the source, with its own dense net; nothing of theirs was run here.",
)
SOURCES = (
    "S2: low-rank SVD training with rank selection, Algorithms 1 to 3. DLRT: Schotthöfer et al., arXiv 2205.13571. "
    "ALDS and SVD-energy: Liebenwein et al., arXiv 2107.11442."
)


def build(options: Options) -> list[Path]:
    """SVD training beside its rivals and what was published for the same net and data."""
    found = [record for record in command.load(options) if _kind(record["config"]["algorithm"]) in KINDS]
    if not found:
        raise command.lacking(options, "svd_training or of what it is held against")
    runs = pd.DataFrame([_row(record) for record in found])
    runs["change_pp"] = 100 * (runs["test_accuracy"] - _dense_of(runs))
    dense = runs.dropna(subset="dense_accuracy").drop_duplicates(["model", "data", "seed"])
    dense = dense.assign(
        method="dense", order="0", epochs=math.nan, params_kept=1.0, test_accuracy=dense["dense_accuracy"],
        test_loss=dense["dense_loss"], change_pp=math.nan, seconds=math.nan, calibration_seed=None,
    )  # fmt: skip
    published = compare.read_published(PUBLISHED)
    rows: list[Any] = []
    for (model, data), own in runs.groupby(["model", "data"]):
        both = pd.concat([dense[(dense["model"] == model) & (dense["data"] == data)], own])
        both = both.sort_values("order", kind="stable")
        rows += frame.over_seeds(both, ("model", "data", "method", "epochs"), VALUES).to_dict(orient="records")
        rows += _published(published, str(model), str(data))
    table = pd.DataFrame(rows)
    table["net"] = table["model"] + ", " + table["data"]
    table.loc[table["method"] == "dense", ["params_kept_std"]] = math.nan
    caption = "SVD training with rank selection against training first and truncating after"
    shown = Table(options.name, table, COLUMNS, caption, [*NOTES, SOURCES], group="net")
    return save([shown], options.out, command.origin(options, found, [PUBLISHED]))


def _row(record: Record) -> dict[str, Any]:
    settings, dense, small = record["config"]["algorithm"], record["dense"], record["compressed"]
    scratch = record["config"]["checkpoint"] is None
    order, method = _method(record)
    method += ", spatial" if "spatial" in record["names"]["decomposer"] else ""
    return {
        "model": trainings.net(record),
        "data": record["names"]["data"],
        "seed": record["seed"],
        "calibration_seed": record["calibration_seed"],
        "order": order,
        "method": method,
        "epochs": settings.get("recipe", {}).get("epochs", 0),
        "params_kept": small["params"] / dense["params"],
        "test_accuracy": small["test"]["accuracy"],
        "test_loss": small["test"]["loss"],
        # Before a training from scratch the dense net knows nothing.
        "dense_accuracy": math.nan if scratch else dense["test"]["accuracy"],
        "dense_loss": math.nan if scratch else dense["test"]["loss"],
        "seconds": trainings.seconds(record),
    }


def _method(record: Record) -> tuple[str, str]:
    """Its place in the table, as a text that sorts, and what a row is called."""
    settings = record["config"]["algorithm"]
    kind = _kind(settings)
    if kind == "SVDTraining":
        start = trainings.start(record)
        said = f"SVD training {start}, {trainings.way(record)}"
        return f"{3 if start == 'from scratch' else 4} {said}", said
    if kind == "FineTuning":
        said = f"{_truncation(settings['selector'])}, then fine-tuned"
        return f"2 {said}", said
    if kind == "RankSelection":
        return f"1 {settings['epsilon']:g}", f"rank selection, ε {settings['epsilon']:g}"
    return f"1 {_truncation(settings)}", _truncation(settings)


def _kind(settings: dict[str, Any]) -> str:
    return class_of(settings)


def _truncation(settings: dict[str, Any]) -> str:
    asked = {key: settings[key] for key in ("rank", "ratio", "energy", "params_kept") if settings.get(key) is not None}
    name = re.sub("(?<=[a-z])(?=[A-Z])", " ", _kind(settings)).lower()
    return f"{name}, " + ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in asked.items())


def _dense_of(runs: pd.DataFrame) -> pd.Series:
    """The accuracy of the trained dense net of each run's model, data and seed; NaN where no run starts from it."""
    keys = ["model", "data", "seed"]
    known = runs.dropna(subset="dense_accuracy").drop_duplicates(keys).set_index(keys)["dense_accuracy"]
    return pd.Series([known.get(tuple(row), math.nan) for row in runs[keys].itertuples(index=False)], index=runs.index)


def _published(published: pd.DataFrame, model: str, data: str) -> list[dict[str, Any]]:
    """The rows that other papers print for this net and data."""
    rows: list[Any] = []
    claims = published[published["claim"].str.startswith("trained-")]
    for _, claim in claims.groupby("claim", sort=False):
        first = claim.iloc[0]
        if (first["model"].lower().replace("-", ""), first["data"].lower().replace("-", "")) != (model, data):
            continue
        values = claim.set_index("metric")["value"].astype(float)
        if not {"drop_percent"} < set(values.index):
            raise UserError(f"{PUBLISHED} has no drop_percent and accuracy of {first['claim']}")
        dense, top1 = (values.get(f"{which}_top1_percent", math.nan) for which in ("original", "compressed"))
        change = values.get("change_top1_pp", top1 - dense)
        rows.append(
            {
                "model": model,
                "data": data,
                "method": f"published: {first['source']}",
                "params_kept": 1 - values["drop_percent"] / 100,
                "test_accuracy": top1 / 100,
                "change_pp": change,
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of the script; the exit status."""
    return command.run(build, "table5", "table5", arguments)


if __name__ == "__main__":
    sys.exit(main())
