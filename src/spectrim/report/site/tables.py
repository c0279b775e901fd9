"""Read a committed table or figure for the report: its cells as printed, and the records of each row."""

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from spectrim.errors import UserError
from spectrim.report.table import RECORDS

NAME = re.compile(r"(table|figure)(\d+)(?:_(\w+))?$")
JUDGED = re.compile(r"\b(holds|does not hold|not comparable|is met|is not met)\b")


@dataclass(frozen=True)
class Row:
    """One row: its cells as printed, and the names of the records that they are computed from."""

    cells: list[str]
    records: list[str]


@dataclass(frozen=True)
class Shown:
    """A table or figure of the report.

    ``headers``: of the columns.
    ``notes``: the paragraphs below the table.
    ``pictures``: names of the pictures that show its numbers.
    """

    name: str
    caption: str
    headers: list[str]
    rows: list[Row]
    notes: list[str]
    pictures: list[str]

    @property
    def title(self) -> str:
        """The title of the page."""
        return title_of(self.name) or self.name

    @property
    def verdicts(self) -> list[str]:
        """The notes that judge a claim or an aim."""
        return [note for note in self.notes if JUDGED.search(note)]


def title_of(name: str) -> str | None:
    """Return the title of a table or figure from the name of its file: table7_models → Table 7: models."""
    found = NAME.match(name)
    if not found:
        return None
    kind, number, part = found.groups()
    return f"{kind.capitalize()} {number}" + (f": {part.replace('_', ' ')}" if part else "")


def read_all(results: Path) -> list[Shown]:
    """Return every table with a csv, tables before figures, in the order of their numbers.

    ``results``: folder of ``tables`` and ``figures``.
    Raises ``UserError`` where there is none, or where a csv has no Markdown file with the same rows.
    """
    names = sorted((path.stem for path in (results / "tables").glob("*.csv")), key=_place)
    if not names:
        raise UserError(f"no tables in {results / 'tables'}: build them with `spectrim-table`")
    pictures: dict[str, list[str]] = {name: [] for name in names}
    for path in sorted((results / "figures").glob("*.png")):
        owners = [name for name in names if path.stem == name or path.stem.startswith(f"{name}_")]
        if owners:
            pictures[max(owners, key=len)].append(path.name)
    return [_read(results / "tables", name, pictures[name]) for name in names]


def _place(name: str) -> tuple[bool, int, str]:
    found = NAME.match(name)
    return (found[1] == "figure", int(found[2]), name) if found else (True, 10**6, name)


def _read(folder: Path, name: str, pictures: list[str]) -> Shown:
    path = folder / f"{name}.md"
    try:
        parts = path.read_text(encoding="utf-8").strip().split("\n\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; build the table anew") from error
    if len(parts) < 2 or not parts[1].startswith("|"):
        raise UserError(f"{path} is no table: build it anew")
    caption, grid, *notes = parts
    body = [_cells(line) for line in grid.splitlines()]
    with (folder / f"{name}.csv").open(encoding="utf-8", newline="") as stream:
        named = [(row.get(RECORDS) or "").split() for row in csv.DictReader(stream)]
    width = len(body[0]) - any(named)  # The links of the Markdown file are made anew.
    headers, rows = body[0][:width], [cells[:width] for cells in body[2:]]
    if len(rows) != len(named):
        raise UserError(f"{folder / name}.csv and .md have other rows: build the table anew")
    shown = [Row(cells, records) for cells, records in zip(_filled(rows), named, strict=True)]
    return Shown(name, caption.strip("*"), headers, shown, notes, pictures)


def _cells(line: str) -> list[str]:
    """Return the cells of a line of a Markdown table."""
    parts = re.split(r"(?<!\\)\|", line.strip())[1:-1]
    return [part.strip().replace("\\|", "|") for part in parts]


def _filled(rows: list[list[str]]) -> Iterator[list[str]]:
    """Yield the rows with each empty cell filled from the row above: a group is printed once, but rows are sorted."""
    above: list[str] = []
    for cells in rows:
        above = [cell or last for cell, last in zip(cells, above or cells, strict=True)]
        yield above
