"""Copy the tables that README and docs show into them, between markers: ``python experiments/readme.py [--check]``."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from spectrim.errors import UserError
from spectrim.report.table import Column, Table
from spectrim.tools import files

ROOT = Path(__file__).resolve().parents[1]
# The links of the blocks below are written as from docs/; ``filled`` shortens them for a page at the root.
SHOWN = (
    Column("model", "model"),
    Column("method", "method"),
    Column("params_kept", "params kept %", 1, scale=100),
    Column("change_test_loss", "Δ test loss", 4, signed=True),
    Column("test_accuracy", "top-1 %", 2, scale=100),
    Column("predicted_change", "predicted Δ loss", 4, signed=True),
    Column("change_calibration_loss", "measured Δ calibration loss", 4, signed=True),
    Column("n", "n"),
)
# Rows for the whole table alone.
LEFT_OUT = ("ratio 0.5", "ratio 0.25")
NOTE = (
    "CIFAR-10, no fine-tuning; n = training seeds × calibration seeds; Δ = compressed − dense. The whole table: "
    "[Table 2](../results/tables/table2.md)."
)

SIZES, AT_MOST_OFF = (0.826, 0.7, 0.5, 0.4, 0.3), 0.02  # parts of the parameters, and how near a row must be to one
FRONTIER = (
    "ResNet-20, CIFAR-10, no fine-tuning, three trainings; the columns are the parts of the parameters kept. A dash: "
    f"nothing that this selector found is within {100 * AT_MOST_OFF:g} points of it. With losses, MACs and the exact "
    "sizes: [Figure 4 in numbers](../results/tables/figure4.md)."
)

SPOKEN = (
    Column("net", "model, data"),
    Column("method", "method"),
    Column("params_kept", "params kept %", 1, scale=100),
    Column("macs_kept", "MACs kept %", 1, scale=100),
    Column("perplexity", "perplexity, reviews", 1),
    Column("perplexity_sotu", "perplexity, speeches", 1),
    Column("test_accuracy", "top-1 %", 2, scale=100),
    Column("n", "n"),
)
LANGUAGE = (
    "No fine-tuning; calibrated on film reviews; n = training seeds × calibration draws. "
    "Other sizes, losses and what the papers print: [Table 3](../results/tables/table3.md)."
)

SELECTED = (
    Column("approach", "selector"),
    *(
        Column(f"{stage}_{size}", f"{size} % kept{said}", 2, scale=100)
        for stage, said in {"cut": "", "trained": ", trained"}.items()
        for size in (50, 30)
    ),
    Column("cut_cpu_seconds", "CPU seconds to select", 1),
    Column("cut_read", "images read to select", 0),
)
SELECTORS = (
    "Test top-1 in per cent. At 70 % too, with the source's labels and the notes that belong to the numbers: "
    "[Table 1](../results/tables/table1.md); every size by itself: "
    "[all sizes](../results/tables/table1_sizes.md)."
)


def table2(results: Path) -> str:
    """A cut of Table 2, as markdown."""
    rows = pd.read_csv(results / "tables/table2.csv", dtype={"n": str})
    rows = rows[~rows["method"].str.endswith(LEFT_OUT)]
    return Table("table2", rows, SHOWN, "Table 2, cut", [NOTE], group="model").markdown()


def claims(results: Path) -> str:
    """The verdict on every claim, as markdown."""
    return (results / "tables/table2_claims.md").read_text(encoding="utf-8")


def frontier(results: Path) -> str:
    """Figure 4 of ResNet-20 in numbers, as markdown: a row a selector, a column a size."""
    rows = pd.read_csv(results / "tables/figure4.csv", dtype={"n": str})
    rows = rows[(rows["model"] == "resnet20") & ~rows["asked"].fillna("max loss").str.startswith("max loss")]
    change = Column("change_test_accuracy_pp", "", 2, signed=True)
    table: dict[str, dict[str, str]] = {}
    for row in rows.to_dict(orient="records"):
        near = [size for size in SIZES if abs(row["params_kept"] - size) <= AT_MOST_OFF]
        if near:
            table.setdefault(row["variant"], {})[f"{100 * near[0]:g} %"] = change.cell(
                {str(key): value for key, value in row.items()}
            )
    found = pd.DataFrame.from_dict(table, orient="index").rename_axis("Δ top-1 (pp) at").reset_index()
    return found.fillna("–").to_markdown(index=False, disable_numparse=True) + f"\n\n{FRONTIER}\n"


def language(results: Path) -> str:
    """Table 3 at a fifth fewer parameters, and where a selector chooses by itself, as markdown."""
    rows = pd.read_csv(results / "tables/table3.csv", dtype={"n": str}).dropna(subset="model")
    shown = rows["method"].str.contains("80 %") | ~rows["method"].str.contains("%|0.008")
    return Table("language", rows[shown], SPOKEN, "Table 3, cut", [LANGUAGE], group="net").markdown()


def selectors(results: Path) -> str:
    """Table 1 at a half and at 30 % of the parameters, a table a net, as markdown."""
    rows = pd.read_csv(results / "tables/table1.csv", dtype={"n": str})
    rows["net"] = rows["block"].str.partition(",")[0]
    rows["approach"] = rows["approach"].str.replace(r" \(\d+\)$", "", regex=True)  # its footnotes stay there
    parts = []
    for _, own in rows.groupby("net", sort=False):
        table = Table("selectors", own, SELECTED, f"{own['block'].iloc[0]}", [])
        parts.append(table.markdown())
    return "\n".join(parts) + f"\n{SELECTORS}\n"


def checkpoints(results: Path) -> str:
    """What each committed checkpoint reached, from the record of its training, as markdown."""
    rows = []
    for path in sorted((results / "checkpoints").glob("*.json")):
        training = json.loads(path.read_text(encoding="utf-8"))
        rows.append(
            {
                "checkpoint": path.stem,
                "parameters": f"{training['params']:,}",
                "epochs": len(training["curve"]),
                "test top-1 %": f"{100 * training['test']['accuracy']:.2f}",
                "test loss": f"{training['test']['loss']:.4f}",
                "stored as": training["stored_as"],
            }
        )
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True) + "\n"


# What is shown on which page, between markers of these names.
PAGES: dict[str, dict[str, Callable[[Path], str]]] = {
    "README.md": {"frontier": frontier},
    "docs/algorithms.md": {"selectors": selectors},
    "docs/results.md": {
        "claims": claims,
        "table2": table2,
        "frontier": frontier,
        "language": language,
        "checkpoints": checkpoints,
    },
}


def filled(page: str, text: str, results: Path) -> str:
    """``text`` with what is between each pair of markers made anew. Raises ``UserError`` where one is missing."""
    for name, make in PAGES[page].items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, found, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise UserError(f"{page} lacks the markers {start} and {end}: put them around where {name} is shown")
        block = make(results) if "/" in page else make(results).replace("](../", "](")
        text = f"{before}{start}\n{block}{end}{after}"
    return text


def main() -> int:
    """Entry of the script; with ``--check`` nothing is written and the status says whether all is up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page is out of date")
    options = parser.parse_args()
    try:
        before = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
        after = {page: filled(page, text, ROOT / "results") for page, text in before.items()}
        if not options.check:
            files.write({ROOT / page: text.encode() for page, text in after.items()})
        for page in PAGES:
            if options.check and before[page] != after[page]:
                raise UserError(f"{page} is out of date: run `make readme`")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
