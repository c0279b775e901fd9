"""Save a DataFrame as NAME.csv (full precision), NAME.md and NAME.tex (rounded), and NAME.provenance.json."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pandas as pd

from spectrim.report import coverage, latex
from spectrim.tools import files

ABSENT = "–"
HUGE = 1e6  # larger numbers that are not counts are printed with an exponent
RECORDS = "records"  # column of the names of a row's records; ``averages.records_of`` fills it
FOLDER = "../records"  # where a table in ``results/tables`` finds them
PAPER = latex.FEW  # columns of an excerpt for a paper, which stays upright


@dataclass(frozen=True)
class Column:
    """Format of one printed column. If the frame has a column ``KEY_std``, a cell reads ``mean ± std``.

    ``key``: column of the frame.
    ``header``: printed header, with the unit.
    ``digits``: number of decimals; None for text.
    ``scale``: factor of the printed value (100 for percent).
    ``signed``: print a plus sign.
    """

    key: str
    header: str
    digits: int | None = None
    scale: float = 1.0
    signed: bool = False

    def cell(self, row: Mapping[str, Any]) -> str:
        """Return one printed cell. An absent value is a dash; the deviation of a single run is omitted."""
        value = row[self.key]
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ABSENT
        if self.digits is None:
            return str(value)
        deviation = row.get(f"{self.key}_std", math.nan)
        spread = "" if math.isnan(deviation) else f" ± {deviation * self.scale:.{self.digits}f}"
        return number(float(value) * self.scale, self.digits, self.signed) + spread


def pick(columns: Sequence[Column], keys: Sequence[str]) -> list[Column]:
    """Return those of the columns that have these keys, in the order of the keys."""
    known = {column.key: column for column in columns}
    return [known[key] for key in keys]


def number(value: float, digits: int, signed: bool = False) -> str:
    """Format a number with a true minus sign.

    A value that rounds to zero has no sign. A value of at least ``HUGE`` has an exponent if ``digits`` is not 0.
    """
    form = ".1e" if digits and abs(value) >= HUGE else f".{digits}f"
    text = f"{value:{'+' if signed else ''}{form}}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")


@dataclass(frozen=True)
class Table:
    """A table and its format.

    ``group``: key of a column whose repeated values are printed once.
    ``hidden``: columns of ``data`` that only code reads; the csv omits them.
    ``excerpt``: whether it repeats rows of another table, which has their csv and provenance.
    """

    name: str
    data: pd.DataFrame
    columns: Sequence[Column]
    caption: str
    notes: Sequence[str] = ()
    group: str | None = None
    hidden: Sequence[str] = ()
    excerpt: bool = False

    def printed(self) -> pd.DataFrame:
        """Return the cells as text, under their headers."""
        rows: list[Any] = self.data.to_dict(orient="records")
        cells = {column.header: [column.cell(row) for row in rows] for column in self.columns}
        for column in self.columns:
            if column.key == self.group:
                shown = cells[column.header]
                cells[column.header] = [
                    "" if index and shown[index - 1] == text else text for index, text in enumerate(shown)
                ]
        return pd.DataFrame(cells)

    def markdown(self) -> str:
        """Return the caption, the table and the notes as Markdown. The last column links the records of each row."""
        align = ["left" if column.digits is None else "right" for column in self.columns]
        printed = (
            self.printed()
            .map(lambda text: text.replace("|", "\\|"))
            .rename(columns=lambda text: text.replace("|", "\\|"))
        )
        body = printed.to_markdown(index=False, colalign=align, disable_numparse=True)
        lines = map("".join, zip_longest(body.splitlines(), self._linked(), fillvalue=""))
        return "\n\n".join([f"**{self.caption}**", "\n".join(lines), *self.notes]) + "\n"

    def _linked(self) -> list[str]:
        """Return the end of each line of the Markdown table: links to the records of its row.

        A group whose rows all have the same records, such as the points of a curve, links them in its first row alone.
        """
        if self.excerpt or RECORDS not in self.data:
            return []
        named = self.data[RECORDS].fillna("")
        if self.group is not None:
            groups = self.data[self.group]
            named = named.mask(groups.duplicated() & (named.groupby(groups).transform("nunique") == 1), "")
        links = [
            " ".join(f"[{at}]({FOLDER}/{name}.json)" for at, name in enumerate(names.split(), 1)) for names in named
        ]
        return [" runs |", ":-----|", *(f" {cell} |" for cell in links)]

    def latex(self) -> str:
        """Return a LaTeX table that fits the page, with a rule between groups and the notes below."""
        printed = self.printed()
        return latex.table(
            list(printed.columns),
            printed.to_numpy().tolist(),
            [column.digits is not None for column in self.columns],
            self._starts(printed),
            self.caption,
            f"tab:{self.name}",
            self.notes,
        )

    def _starts(self, printed: pd.DataFrame) -> list[int]:
        """Return the index of the first row of every group but the first."""
        if self.group is None:
            return []
        names = printed.iloc[:, [column.key for column in self.columns].index(self.group)]
        return [index for index, name in enumerate(names) if index and name]

    def csv(self) -> str:
        """Return the numbers in full precision, under the column names of the frame, and last the records of a row."""
        last = [column for column in (RECORDS,) if column in self.data]
        shown = self.data[[*self.data.columns.drop([*self.hidden, *last]), *last]]
        return shown.to_csv(index=False, lineterminator="\n")

    def paper(self, keys: Sequence[str], rows: "pd.Series[bool] | None" = None, notes: Sequence[str] = ()) -> "Table":
        """Return an excerpt for a paper, which is saved as Markdown and LaTeX.

        ``keys``: of the columns, at most ``PAPER``.
        ``rows``: which rows it shows; all by default.
        """
        assert len(keys) <= PAPER, f"{self.name}: an excerpt has at most {PAPER} columns"
        return replace(
            self,
            name=f"{self.name}_paper",
            data=self.data if rows is None else self.data[rows],
            columns=pick(self.columns, keys),
            notes=notes,
            group=self.group if self.group in keys else None,
            excerpt=True,
        )


def save(tables: Sequence[Table], folder: Path, origin: Mapping[str, Any]) -> list[Path]:
    """Write tables under ``folder/tables``, either all or none. Return the paths.

    ``origin``: provenance of the tables, from ``command.origin``. The first note says how many runs it lacks, if any.
    """
    contents: dict[Path, bytes] = {}
    missing = [note] if (note := coverage.note(origin)) else []
    for table in (replace(one, notes=[*missing, *one.notes]) for one in tables):
        place = folder / "tables" / table.name
        contents[place.with_name(f"{table.name}.md")] = table.markdown().encode()
        contents[place.with_name(f"{table.name}.tex")] = table.latex().encode()
        if not table.excerpt:
            contents[place.with_name(f"{table.name}.csv")] = table.csv().encode()
            contents[place.with_name(f"{table.name}.provenance.json")] = provenance_bytes(table.name, origin)
    files.write(contents)
    return list(contents)


def provenance_bytes(name: str, origin: Mapping[str, Any]) -> bytes:
    """Return the content of the provenance file of a table or figure."""
    return (json.dumps({"name": name, **origin}, indent=1, ensure_ascii=False) + "\n").encode()
