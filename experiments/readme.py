"""Copy tables and numbers into README and docs, between markers: ``python experiments/readme.py [--check]``."""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import quoted

from spectrim.errors import UserError
from spectrim.tools import files

ROOT = Path(__file__).resolve().parents[1]
# The links of the blocks below are written as from docs/; ``filled`` shortens them for a page at the root.
MORE = {
    "table1": "At 70 % too, with the source's labels, images read and notes: [Table 1](../results/tables/table1.md); "
    "every size by itself: [all sizes](../results/tables/table1_sizes.md).",
    "table2": "All columns and truncations: [Table 2](../results/tables/table2.md).",
    "table3": "Other sizes, MACs, losses and what the papers print: [Table 3](../results/tables/table3.md).",
    "figure4": "Losses, MACs and exact sizes: [Figure 4 in numbers](../results/tables/figure4.md).",
}


# Rows of Figure 4 that have a stronger neighbour in the same form, or the same selector in the other form.
NOT_IN_FRONT = (
    "energy truncation",
    "energy truncation, pivoted",
    "global threshold",
    "ALDS, BatchNorm kept",
    "knapsack (BALF), pivoted",
    "knapsack (BALF), refitted as ours, pivoted",
    "joint, ours, pivoted",
    "knapsack (BALF), refitted as ours",
)


def excerpt(name: str, part: str = "_paper*") -> Callable[[Path], str]:
    """Return the function that makes the block of a table: its excerpts, and a link to the whole table.

    ``part``: pattern of the rest of their names.
    """

    def block(results: Path) -> str:
        paths = sorted((results / "tables").glob(f"{name}{part}.md"))
        if not paths:
            raise UserError(f"{results / 'tables'} has no {name}_paper.md: run `make table-{name}`")
        return "\n".join(path.read_text(encoding="utf-8") for path in paths) + f"\n{MORE[name]}\n"

    return block


def front_page(results: Path) -> str:
    """Return the first excerpt of Figure 4 without the rows that the front page leaves to the page of results."""
    lines = excerpt("figure4", "_paper")(results).splitlines(keepends=True)
    return "".join(line for line in lines if line.strip("|").split("|")[0].strip() not in NOT_IN_FRONT)


def claims(results: Path) -> str:
    """Return the verdict on every claim, as Markdown without the links to records."""
    text = (results / "tables/table2_claims.md").read_text(encoding="utf-8")
    return re.sub(r"(?m)^(\|.*\|)[^|\n]*\|$", r"\1", text)


def checkpoints(results: Path) -> str:
    """Return what each committed checkpoint reached, from the record of its training, as Markdown."""
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


def zoo(results: Path) -> str:
    """Return what works with which architecture, as Markdown."""
    return (results / "benchmarks/zoo.md").read_text(encoding="utf-8")


# The blocks of each page, which stand between markers of these names.
PAGES: dict[str, dict[str, Callable[[Path], str]]] = {
    "README.md": {"frontier": front_page},
    "docs/algorithms.md": {"selectors": excerpt("table1")},
    "docs/results.md": {
        "claims": claims,
        "table2": excerpt("table2"),
        "frontier": excerpt("figure4"),
        "language": excerpt("table3"),
        "checkpoints": checkpoints,
    },
    "docs/supported_models.md": {"zoo": zoo},
    "docs/using_the_result.md": {},
}


# A number inside a sentence; its name is a key of ``quoted.NUMBERS``.
NUMBER = re.compile(r"<!-- =(\w+) -->[^<]*<!-- = -->")


def filled(page: str, text: str, results: Path) -> str:
    """Return a page with every block and number made anew.

    Raises ``UserError`` where the marker of a block is missing, or where a number has no known name.
    """

    def number(found: re.Match[str]) -> str:
        if found[1] not in quoted.NUMBERS:
            raise UserError(f"{page} quotes {found[1]}, which quoted.py does not know")
        return f"<!-- ={found[1]} -->{quoted.NUMBERS[found[1]](results)}<!-- = -->"

    text = NUMBER.sub(number, text)
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
    """Run the script. Return 1 if a page is out of date and ``--check`` is given, or if a block cannot be made."""
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
