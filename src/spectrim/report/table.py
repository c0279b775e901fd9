"""Save a DataFrame as NAME.csv (full precision), NAME.md and NAME.tex (rounded), and NAME.provenance.json."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from spectrim.tools import files

ABSENT = "–"
HUGE = 1e6  # larger numbers that are not counts are printed with an exponent
LATEX = {
    "\\": r"\textbackslash{}",
    "%": r"\%",
    "_": r"\_",
    "&": r"\&",
    "#": r"\#",
    "$": r"\$",
    "±": r"$\pm$",
    "−": "$-$",
    "≤": r"$\le$",
    "≥": r"$\ge$",
    "<": "$<$",
    ">": "$>$",
    "×": r"$\times$",
    "Δ": r"$\Delta$",
    "δ": r"$\delta$",
    "ε": r"$\varepsilon$",
    "ρ": r"$\rho$",
    "σ": r"$\sigma$",
    "√": r"$\surd$",
    "₁": "$_1$",
    "∞": r"$\infty$",
    "‖": r"$\|$",
    "|": r"$|$",
    "→": r"$\to$",
    "–": "--",
}


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
    """

    name: str
    data: pd.DataFrame
    columns: Sequence[Column]
    caption: str
    notes: Sequence[str] = ()
    group: str | None = None
    hidden: Sequence[str] = ()

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
        """Return the caption, the table and the notes as Markdown."""
        align = ["left" if column.digits is None else "right" for column in self.columns]
        printed = (
            self.printed()
            .map(lambda text: text.replace("|", "\\|"))
            .rename(columns=lambda text: text.replace("|", "\\|"))
        )
        body = printed.to_markdown(index=False, colalign=align, disable_numparse=True)
        return "\n\n".join([f"**{self.caption}**", body, *self.notes]) + "\n"

    def latex(self) -> str:
        """Return a LaTeX ``table`` with booktabs rules, a rule between groups, and the notes below."""
        printed = self.printed().map(latex).rename(columns=latex)
        align = "".join("l" if column.digits is None else "r" for column in self.columns)
        text = printed.style.hide(axis="index").to_latex(
            hrules=True,
            column_format=align,
            caption=latex(self.caption),
            label=f"tab:{self.name}",
            position_float="centering",
        )
        if self.group is not None:
            text = _ruled(text, printed.iloc[:, [column.key for column in self.columns].index(self.group)])
        notes = "".join(f"\n\\par\\smallskip\\footnotesize {latex(note)}" for note in self.notes)
        return "% needs \\usepackage{booktabs}\n" + text.replace("\n\\end{table}", f"{notes}\n\\end{{table}}")

    def csv(self) -> str:
        """Return the numbers in full precision, under the column names of the frame."""
        return self.data.drop(columns=list(self.hidden)).to_csv(index=False, lineterminator="\n")


def latex(text: str) -> str:
    """Escape plain text for LaTeX."""
    return "".join(LATEX.get(character, character) for character in text)


def _ruled(text: str, groups: "pd.Series[str]") -> str:
    """Insert a rule above each row that begins a group, except the first."""
    before, rule, after = text.partition("\\midrule\n")
    rows = after.split("\n")
    for index, name in reversed(list(enumerate(groups))):
        if index and name:
            rows.insert(index, "\\midrule")
    return before + rule + "\n".join(rows)


def save(tables: Sequence[Table], folder: Path, origin: Mapping[str, Any]) -> list[Path]:
    """Write tables under ``folder/tables``, either all or none. Return the paths.

    ``origin``: provenance of the tables, from ``command.origin``.
    """
    contents: dict[Path, bytes] = {}
    for table in tables:
        place = folder / "tables" / table.name
        contents[place.with_name(f"{table.name}.csv")] = table.csv().encode()
        contents[place.with_name(f"{table.name}.md")] = table.markdown().encode()
        contents[place.with_name(f"{table.name}.tex")] = table.latex().encode()
        contents[place.with_name(f"{table.name}.provenance.json")] = provenance_bytes(table.name, origin)
    files.write(contents)
    return list(contents)


def provenance_bytes(name: str, origin: Mapping[str, Any]) -> bytes:
    """Return the content of the provenance file of a table or figure."""
    return (json.dumps({"name": name, **origin}, indent=1, ensure_ascii=False) + "\n").encode()
