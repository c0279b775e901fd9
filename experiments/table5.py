"""Table 5: SVD training with rank selection (S2), beside truncation after training and published results."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from spectrim.errors import UserError
from spectrim.records.records import Record, algorithm_of, class_of, name_of
from spectrim.report import averages, claims, command, compare, frame, paired, trainings
from spectrim.report.command import Options
from spectrim.report.table import Column, Table, save

PUBLISHED = Path(__file__).with_name("published.csv")
# The stages of the table, in the order of its rows, and the selectors without training in theirs.
DENSE, CUT, FINE_TUNED, FROM_SCRATCH, FROM_TRAINED = range(5)
CUTS = {"rankselection": "rank selection", "globalthreshold": "global threshold", "truncation": "truncation"}
ALGORITHMS = (*CUTS, "finetuning", "svdtraining")
RESULTS = ("Table on LeNet-5", "Retrained")  # places in the papers that print trained low-rank networks
VALUES = ("params_kept", "test_accuracy", "change_pp", "test_loss", "seconds")
COLUMNS = (
    Column("net", "net, data"),
    Column("method", "method"),
    Column("epochs", "epochs", 0),
    Column("params_kept", "params kept %", 2, scale=100),
    Column("test_accuracy", "top-1 %", 2, scale=100),
    Column("change_pp", "Δ top-1 to dense pp", 2, signed=True),
    Column("change_pp_p", "its p", 3),
    Column("test_loss", "test loss", 4),
    Column("seconds", "seconds", 0),
    Column("n", "n"),
)
PAPER = ("net", "method", "epochs", "params_kept", "test_accuracy", "change_pp")
PAPER_NOTE = "Mean ± standard deviation over training seeds. Δ is the change to the dense network of the same seed."
NOTES = (
    averages.NOTE,
    "Params kept counts the whole model. Δ is the change to the dense network of the same seed, and its p is that of a "
    "two-sided paired t-test; rows from a trained net start from that network. Epochs are those after it, or all "
    "epochs from scratch. Seconds are those of compression and training on one core. Networks that shared a GPU have "
    "none.",
    "SVD training trains U, Σ and V. After each epoch but the last few it cuts them as far as the loss on the training "
    "images moves by less than ε. Other methods were given a budget near the size that this left.",
    "Hoyer and nuclear are regularisers, with their strength; none is a training without one. Cuts counts the epochs "
    "that end with a rank selection. Priced: energy is weighed against its cost in parameters. "
    "Steps as printed: no bound on how far a step on a factor moves its layer, at the learning rate that this needs. "
    "Spatial: a convolution becomes one of kh x 1 and one of 1 x kw; otherwise one of kh x kw and one of 1 x 1.",
    "One training, LeNet-5 on MNIST with no regulariser and seed 0, was interrupted after an epoch and resumed by a "
    "version that did not repeat an unbroken run bit by bit.",
    "Published rows are as printed in the source, with its own dense network. Nothing of them was run here.",
)
SOURCES = (
    "S2: low-rank SVD training with rank selection, Algorithms 1 to 3. DLRT: Schotthöfer et al., arXiv 2205.13571. "
    "ALDS and SVD-energy: Liebenwein et al., arXiv 2107.11442."
)


def build(options: Options) -> list[Path]:
    """Build Table 5: SVD training beside its rivals and the published results for the same network and data."""
    found = [record for record in command.load(options) if algorithm_of(record) in ALGORITHMS]
    if not found:
        raise command.lacking(options, "svd_training or of what it is held against")
    runs = pd.DataFrame([_row(record) for record in found])
    runs["change_pp"] = 100 * (runs["test_accuracy"] - _dense_of(runs))
    dense = runs.dropna(subset="dense_accuracy").drop_duplicates(["model", "data", "seed"])
    dense = dense.assign(
        method="dense", stage=DENSE, epochs=math.nan, params_kept=1.0, test_accuracy=dense["dense_accuracy"],
        test_loss=dense["dense_loss"], change_pp=math.nan, seconds=math.nan, calibration_seed=None,
    )  # fmt: skip
    published = compare.read_published(PUBLISHED)
    rows: list[Any] = []
    for (model, data), own in runs.groupby(["model", "data"]):
        own = own.iloc[sorted(range(len(own)), key=own["order"].tolist().__getitem__)]
        both = pd.concat([dense[(dense["model"] == model) & (dense["data"] == data)], own])
        rows += averages.over_seeds(both, ("model", "data", "method", "epochs", "stage"), VALUES).to_dict(
            orient="records"
        )
        rows += _published(published, str(model), str(data))
    table = pd.DataFrame(rows)
    table["change_pp_p"] = [
        paired.p_value(*one) for one in zip(table["change_pp"], table["change_pp_std"], table["runs"], strict=True)
    ]
    table["net"] = table["model"] + ", " + table["data"]
    table.loc[table["stage"] == DENSE, ["params_kept_std"]] = math.nan
    caption = "SVD training with rank selection, beside truncation after training"
    shown = Table(options.name, table, COLUMNS, caption, [*NOTES, SOURCES], group="net", hidden=["stage"])
    return save(
        [shown, shown.paper(PAPER, notes=[PAPER_NOTE])], options.out, command.origin(options, found, [PUBLISHED])
    )


def _row(record: Record) -> dict[str, Any]:
    settings, dense, small = record["config"]["algorithm"], record["dense"], record["compressed"]
    scratch, order = trainings.from_scratch(record), _order(record)
    return {
        "record": name_of(record),
        "model": trainings.net(record),
        "data": record["names"]["data"],
        "seed": record["seed"],
        "calibration_seed": record["calibration_seed"],
        "stage": order[0],
        "order": order,
        "method": _method(record),
        "epochs": settings.get("recipe", {}).get("epochs", 0),
        "params_kept": small["params"] / dense["params"],
        "test_accuracy": small["test"]["accuracy"],
        "test_loss": small["test"]["loss"],
        # The dense network of a training from scratch is untrained.
        "dense_accuracy": math.nan if scratch else dense["test"]["accuracy"],
        "dense_loss": math.nan if scratch else dense["test"]["loss"],
        "seconds": trainings.seconds(record),
    }


def _order(record: Record) -> tuple[Any, ...]:
    """Return the sort key of a run in the table. The stage comes first."""
    settings, algorithm = record["config"]["algorithm"], algorithm_of(record)
    if algorithm == "svdtraining":
        return FROM_SCRATCH if trainings.from_scratch(record) else FROM_TRAINED, trainings.key(record)
    selector = settings["selector"] if algorithm == "finetuning" else settings
    values = [selector["epsilon"]] if algorithm == "rankselection" else frame.rules(selector)
    return FINE_TUNED if algorithm == "finetuning" else CUT, list(CUTS).index(class_of(selector)), values


def _method(record: Record) -> str:
    """Return what the table calls a run."""
    settings, algorithm = record["config"]["algorithm"], algorithm_of(record)
    spatial = ["spatial"] if record["config"]["decomposer"].get("view") == "spatial" else []
    if algorithm == "svdtraining":
        said = ", ".join([f"SVD training {trainings.start(record)}", *trainings.way(record)])
    elif algorithm == "finetuning":
        said = f"{_cut(settings['selector'])}, then fine-tuned"
    else:
        said = _cut(settings)
    return ", ".join([said, *spatial])


def _cut(settings: dict[str, Any]) -> str:
    """Return the name of a selector without training, and its setting."""
    if class_of(settings) == "rankselection":
        return f"{CUTS['rankselection']}, ε {settings['epsilon']:g}"
    given = [f"{rule.replace('_', ' ')} {value:g}" for rule, value in frame.rules(settings)]
    return ", ".join([CUTS[class_of(settings)], *given])


def _dense_of(runs: pd.DataFrame) -> pd.Series:
    """Return the accuracy of the dense network of each run's model, data and seed; NaN if no run starts from it."""
    keys = ["model", "data", "seed"]
    known = runs.dropna(subset="dense_accuracy").drop_duplicates(keys).set_index(keys)["dense_accuracy"]
    return pd.Series([known.get(tuple(row), math.nan) for row in runs[keys].itertuples(index=False)], index=runs.index)


def _published(published: pd.DataFrame, model: str, data: str) -> list[dict[str, Any]]:
    """Return the rows that other papers print for this network and data."""
    rows: list[Any] = []
    results = published[published["where"].isin(RESULTS)]
    for _, claim in results.groupby("claim", sort=False):
        first = claim.iloc[0]
        if (claims.plain(first["model"]), claims.plain(first["data"])) != (claims.plain(model), claims.plain(data)):
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
                "method": f"published: {first['source']}: arXiv {first['arxiv']}",
                "params_kept": 1 - values["drop_percent"] / 100,
                "test_accuracy": top1 / 100,
                "change_pp": change,
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script. Return its exit status."""
    return command.run(build, "table5", "table5", arguments)


if __name__ == "__main__":
    sys.exit(main())
