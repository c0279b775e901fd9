"""Table 1: the rank selectors that S2 lists, with its labels, at equal sizes."""

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from spectrim.report import averages, command, paired, selectors
from spectrim.report.command import Options
from spectrim.report.selectors import BUDGETS, NEAR
from spectrim.report.table import ABSENT, Column, Table, save

LISTED = Path(__file__).with_name("selectors.csv")
PAPER = ("approach", "cut_50", "cut_30", "trained_50", "trained_30", "cut_cpu_seconds")
SIZES_PAPER = ("block", "approach", "epochs", "params_kept", "test_accuracy", "cpu_seconds")
# The two stages of a row, and the end of their column headers.
STAGES = {"cut": "", "trained": ", trained"}
DENSE = Column("dense_accuracy", "dense top-1 %", 2, scale=100)
COLUMNS = (
    Column("block", "net, data"),
    Column("approach", "selector"),
    Column("layers", "layers' ranks"),
    Column("strategy", "strategy"),
    Column("timing", "timing"),
    *(
        Column(f"{stage}_{100 * size:.0f}", f"{100 * size:.0f} % kept{said}: top-1 %", 2, scale=100)
        for stage, said in STAGES.items()
        for size in BUDGETS
    ),
    Column("cut_cpu_seconds", "CPU seconds", 1),
    Column("cut_read", "images read", 0),
    Column("trained_read", "images read, trained", 0),
    Column("n", "n"),
)
SIZES = (
    Column("block", "net, data"),
    Column("approach", "selector"),
    Column("asked", "requested"),
    Column("epochs", "epochs", 0),
    Column("params_kept", "params kept %", 1, scale=100),
    Column("test_accuracy", "top-1 %", 2, scale=100),
    Column("test_loss", "test loss", 4),
    Column("seconds", "seconds", 1),
    Column("cpu_seconds", "CPU seconds", 1),
    Column("read", "images read", 0),
    Column("passes", "passes over the calibration images", 1),
    Column("n", "n"),
)
NOTES = (
    averages.NOTE,
    "Params kept counts the whole model. No selector exceeds its budget. A dash means that there is no run. All "
    "selectors use a plain SVD, because those that train need it. Joint selection and knapsack are made for a whitened "
    "decomposition. The row with pivoted factors has one, in the better view of each layer, and ranks by the knapsack.",
    "The labels are those that the source prints. A selector that the source does not list has none. Layers' ranks "
    "says whether the rank of a layer depends on the other layers.",
    "Cut alone: the BatchNorm statistics are estimated again after the cut, without labels, for every selector. "
    "Trained: {epochs}. A selector that trains while it selects has as many epochs as the others have after the cut.",
    "CPU seconds and images read are those of one selection, with decomposition and cut. The sizes of one calibration "
    "draw share work, so the largest cost of a draw is shown. Runs on a GPU shared it, so their seconds are not shown. "
    "The runs with pivoted factors shared the processor with other work, which made their seconds longer. "
    "Images read include calibration, verification, images that a training reads to select, and those of the report on "
    "the layers. They do not include the images of training steps. Those of joint selection, knapsack and EVBMF were "
    "counted again, each selection by itself; the records say how.",
)
SIZES_NOTES = (
    "This table shows each size of Table 1 by itself. Epochs are those after the cut or during selection; 0 means that "
    "the network was cut alone. A training from scratch counts all its epochs.",
    "Seconds are those of selection and training together. A later size of one draw does not count the work that it "
    "shares with the first. Runs that shared a GPU have none.",
)


def build(options: Options) -> list[Path]:
    """Build the table of selectors in the source's order, its excerpts, and the table of every size."""
    found = command.load(options)
    listed = selectors.listed(LISTED)
    runs = selectors.runs(options, found, listed)
    rows = selectors.rows(runs, listed)
    numbered = {note: str(place + 1) for place, note in enumerate(dict.fromkeys(filter(None, listed["note"])))}
    blocks = [
        row
        for (model, data), own in rows.groupby(["model", "data"], sort=False)
        for row in _block(own, listed.assign(mark=listed["note"].map(numbered).fillna("")), f"{model}, {data}")
    ]
    footnotes = [f"({mark}) {note}" for note, mark in numbered.items()]
    caption = "The rank selectors that S2 lists, with its labels, at equal sizes"
    notes = [
        *(note.format(epochs=_epochs(rows)) for note in NOTES),
        *_own_sizes(rows),
        *_beside_rivals(runs, listed),
        *footnotes,
    ]
    rows["block"] = rows["model"] + ", " + rows["data"]
    tables = [
        Table(options.name, pd.DataFrame(blocks), COLUMNS, caption, notes, "block", ("model", "selector")),
        Table(f"{options.name}_sizes", rows, SIZES, f"{caption}: every size", SIZES_NOTES, group="block"),
    ]
    nets = [_paper(tables[0], str(model)) for model in dict.fromkeys(rows["model"])]
    return save([*tables, *nets, tables[1].paper(SIZES_PAPER)], options.out, command.origin(options, found, [LISTED]))


def _paper(table: Table, model: str) -> Table:
    """Return the excerpt of one network. Its caption is the network with its dense accuracy."""
    own = table.data[table.data["model"] == model]
    n = ", ".join(dict.fromkeys(own["n"].dropna()))
    notes = [f"Mean ± standard deviation over training seeds × calibration seeds ({n})."]
    excerpt = replace(table, data=own.assign(approach=own["selector"]), group=None).paper(PAPER, notes=notes)
    return replace(excerpt, name=f"{excerpt.name}_{model}", caption=str(own["block"].iloc[0]))


def _block(own: pd.DataFrame, listed: pd.DataFrame, net: str) -> list[dict[str, Any]]:
    """Return one line per listed selector, with or without runs, and one per selector that trains from scratch."""
    first: Any = own.iloc[0]
    dense = DENSE.cell(first)
    said = "" if dense == ABSENT else f" (dense {dense} %)"
    lines = []
    for selector in listed.to_dict(orient="records"):
        runs = own[own["selector"] == selector["selector"]]
        for scratch in sorted(set(runs["scratch"])) or [False]:
            approach = selector["approach"] + (", from scratch" if scratch else "")
            lines.append(
                {
                    "model": own["model"].iloc[0],
                    "selector": approach,
                    "block": f"{net}{said}" if selector["layers"] else f"{net}: not in the source",
                    "approach": approach + (f" ({selector['mark']})" if selector["mark"] else ""),
                    **{label: selector[label] or None for label in ("layers", "strategy", "timing")},
                    **_reached(runs[runs["scratch"] == scratch]),
                }
            )
    return lines


def _reached(runs: pd.DataFrame) -> dict[str, Any]:
    """Return the accuracy at each budget and the cost, for the cut alone and after training; NaN without runs."""
    line: dict[str, Any] = {}
    for stage in STAGES:
        own = runs[(runs["epochs"] > 0) == (stage == "trained")]
        for size in BUDGETS:
            there = own[own["at"] == size]
            for spread in ("", "_std"):
                value = float(there[f"test_accuracy{spread}"].iloc[0]) if len(there) else math.nan
                line[f"{stage}_{100 * size:.0f}{spread}"] = value
        line[f"{stage}_read"] = float(own["read"].max())
        line[f"{stage}_cpu_seconds"] = float(own["cpu_seconds"].max())
    return line | {"n": ", ".join(dict.fromkeys(runs["n"])) or None, "records": averages.records_of(runs["records"])}


def _epochs(rows: pd.DataFrame) -> str:
    """Return the epochs of training, from trained networks and from scratch, in words."""
    beyond, scratch = (sorted(set(own["epochs"]) - {0}) for own in (rows[~rows["scratch"]], rows[rows["scratch"]]))
    said = [f"{' or '.join(map(str, beyond))} epochs beyond the trained net"] if beyond else []
    said += [f"{' or '.join(map(str, scratch))} epochs from scratch"] if scratch else []
    return ", ".join(said) or "no run yet"


def _own_sizes(rows: pd.DataFrame) -> list[str]:
    """Return a note on the sizes that selectors chose themselves, with the columns that show them."""
    own = rows[rows["budget"].isna()]
    said = [
        f"{row['model']}, {row['approach']}, {row['asked']}: {100 * row['params_kept']:.1f} %"
        + (" (in no column)" if math.isnan(row["at"]) else f" (at {100 * row['at']:.0f} %)")
        for _, row in own.iterrows()
    ]
    rule = f"They stand in the column of the nearest budget, if it is within {100 * NEAR:g} % of the parameters."
    return [f"Some selectors choose their size. {rule} {'; '.join(said)}."] if said else []


def _beside_rivals(runs: pd.DataFrame, listed: pd.DataFrame) -> list[str]:
    """Return a note: joint selection beside the best other selector, cut alone at the smallest size, by network.

    All are compared with plain factors, the only ones that the rivals have.
    """
    said = []
    approach = listed.set_index("selector")["approach"]
    alike = runs[(runs["epochs"] == 0) & (runs["budget"] == min(BUDGETS)) & ~selectors.pivoted(runs)]
    cut = alike.assign(top1=100 * alike["test_accuracy"])
    for (model, data), own in cut.groupby(["model", "data"], sort=False):
        found = paired.with_best_rival(own, "selector", "joint", "top1")
        if found:
            said.append(f"{model}, {data}: {found[1]}, {approach[found[0]]}, {found[1].pairs} pairs")
    size = f"{100 * min(BUDGETS):.0f} %"
    ours = f"Joint selection minus its best rival, both with plain factors, cut alone to {size}, {paired.TEST}"
    return [f"{ours}: {'; '.join(said)}."] if said else []


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script. Return its exit status."""
    return command.run(build, "table1", "table1", arguments)


if __name__ == "__main__":
    sys.exit(main())
