"""Print a table as LaTeX that fits the page. The preamble needs booktabs, longtable, array and pdflscape.

Letter size, orientation and column widths follow from the cells. They are chosen for the narrowest common page, that of
the class article with letters of 10 pt.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from operator import truediv

ESCAPES = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "%": r"\%",
    "_": r"\_\allowbreak{}",
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
    "·": r"$\cdot$",
    "Δ": r"$\Delta$",
    "Σ": r"$\Sigma$",
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
    "ö": r"\"o",
}
LINE, LANDSCAPE_LINE = 345.0, 550.0  # pt, the width of the text in the class article, upright and turned
GAP = 3.0  # pt, on either side of a column
# Width of an em in pt: twice that of a digit. Small letters are relatively wider.
SIZES = {"normalsize": 10.0, "small": 9.3, "footnotesize": 8.5, "scriptsize": 8.0, "tiny": 6.85}
UPRIGHT, TURNED = ("normalsize", "small", "footnotesize", "scriptsize"), ("footnotesize", "scriptsize")
WIDEST, NARROW = 16.0, 10.0  # em that a column of text asks for; longer cells are wrapped
FEW = 6  # columns of a table that stays upright where it can
SHORT = 30  # lines of a table that floats; a longer one is broken over pages


@dataclass(frozen=True)
class Layout:
    """How a table is set.

    ``broken``: whether a deviation stands below its mean.
    ``widths``: of the columns, as parts of the line.
    ``lines``: estimate of the number of lines of all rows.
    """

    size: str
    turned: bool
    broken: bool
    widths: Sequence[float]
    lines: int


def escape(text: str) -> str:
    """Escape plain text for LaTeX."""
    return "".join(ESCAPES.get(character, character) for character in text)


def table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: Sequence[bool],
    starts: Sequence[int],
    caption: str,
    label: str,
    notes: Sequence[str],
) -> str:
    """Return a table with booktabs rules and its notes: a float, or a ``longtable`` if it is long or turned.

    ``rows``: the cells as plain text.
    ``numbers``: whether each column holds numbers, which are aligned right and never wrapped.
    ``starts``: indices of rows above which a rule is drawn.
    """
    layout = _layout(headers, rows, numbers)
    columns = "@{}" + "".join(
        f">{{\\{'raggedleft' if number else 'raggedright'}\\arraybackslash}}p{{{width:.4f}\\linewidth}}"
        for number, width in zip(numbers, layout.widths, strict=True)
    )
    head = f"{_row(headers, [False] * len(headers))}\n\\midrule"
    body = "\n".join(
        ("\\midrule\n" if index in starts else "") + _row(cells, numbers, layout.broken)
        for index, cells in enumerate(rows)
    )
    said = "".join(f"\n\n\\par\\smallskip\\footnotesize\\raggedright {escape(note)}" for note in notes)
    begin = f"\\{layout.size}\n\\setlength{{\\tabcolsep}}{{{GAP:g}pt}}\n"
    title = f"\\caption{{{escape(caption)}}}\n\\label{{{label}}}"
    if layout.lines <= SHORT and not layout.turned:
        inner = (
            f"{begin}\\begin{{tabular}}{{{columns}@{{}}}}\n\\toprule\n{head}\n{body}\n\\bottomrule\n\\end{{tabular}}"
        )
        text = f"\\begin{{table}}\n\\centering\n{title}\n{inner}{said}\n\\end{{table}}"
    else:
        text = (
            f"\\begingroup\n\\setlength{{\\LTcapwidth}}{{\\linewidth}}\n{begin}"
            f"\\begin{{longtable}}{{{columns}@{{}}}}\n{title}\\\\\n"
            f"\\toprule\n{head}\n\\endfirsthead\n\\toprule\n{head}\n\\endhead\n\\bottomrule\n\\endfoot\n"
            f"{body}\n\\end{{longtable}}{said}\n\\par\\endgroup"
        )
    if layout.turned:
        text = f"\\begin{{landscape}}\n{text}\n\\end{{landscape}}"
    return f"% needs \\usepackage{{array,booktabs,longtable,pdflscape}}\n{text}\n"


def _row(cells: Sequence[str], numbers: Sequence[bool], broken: bool = False) -> str:
    printed: list[str] = []
    for text, number in zip(cells, numbers, strict=True):
        mean, sign, deviation = text.partition(" ± ") if number else (text, "", "")
        gap = " " if broken else "~"
        printed.append(escape(mean) + (f"{gap}{escape('±')}~{escape(deviation)}" if sign else ""))
    return " & ".join(printed) + (r" \\[2pt]" if broken else r" \\")


def _layout(headers: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[bool]) -> Layout:
    """Choose the largest letters that fit: upright, then turned, then turned with deviations below their means.

    Before a table of few columns is turned, its text is wrapped more, or its deviations stand below their means.
    """
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(headers)
    gaps = 2 * GAP * (len(headers) - 1)
    ways = [(False, WIDEST), (False, NARROW), (True, WIDEST), (True, NARROW)][: 4 if len(headers) <= FEW else 1]
    tried = [(size, False, *way) for sizes in (UPRIGHT[:2], UPRIGHT[2:]) for way in ways for size in sizes]
    tried += [(size, True, broken, WIDEST) for broken in (False, True) for size in TURNED]
    tried += [("tiny", True, True, WIDEST)]
    for size, turned, broken, widest in tried:
        line = LANDSCAPE_LINE if turned else LINE
        least = [_least(*column, broken) for column in zip(headers, columns, numbers, strict=True)]
        full = [max(map(_em, cells), default=0.0) for cells in columns]
        asked = [
            low if number else max(low, min(longest, widest))
            for low, longest, number in zip(least, full, numbers, strict=True)
        ]
        room = (line - gaps) / SIZES[size]
        if sum(asked) <= room:
            break
    else:
        asked = least
    # Columns of text share the room that is left, up to their longest cell.
    more = [0.0 if number else max(long - em, 0.0) for em, long, number in zip(asked, full, numbers, strict=True)]
    part = min(max(room - sum(asked), 0.0) / sum(more), 1.0) if sum(more) else 0.0
    given = [em + part * extra for em, extra in zip(asked, more, strict=True)]
    lines = sum(max(1 + broken, *map(math.ceil, map(truediv, map(_em, cells), given))) for cells in rows)
    return Layout(size, turned, broken, [em * SIZES[size] / line for em in given], lines)


def _least(header: str, cells: Sequence[str], number: bool, broken: bool) -> float:
    """Return the least width of a column in em. A number is not wrapped, but for its deviation if that is below."""
    parts = [part for cell in cells for part in _parts(cell, number, broken)]
    return max(map(_em, [*_words(header), *parts]))


def _parts(cell: str, number: bool, broken: bool) -> list[str]:
    """Return the parts of a cell between which a line may be broken."""
    if not number:
        return _words(cell)
    mean, sign, deviation = cell.partition(" ± ")
    return [mean, sign.lstrip() + deviation] if broken else [cell]


def _words(text: str) -> list[str]:
    """Return the parts between which LaTeX may break a line: at spaces, and after hyphens and underscores."""
    return re.findall(r"[^ _-]*[_-]?", text)


def _em(text: str) -> float:
    """Estimate the width of a text in em of Computer Modern, on the wide side."""
    return sum(_letter(character) for character in text)


def _letter(character: str) -> float:
    if character in " ,.;:'|()[]ijl-":
        return 0.34
    if character in "mMwW%±×−+=<>≤≥→ΔΣ–@∞":
        return 0.87
    return 0.75 if character.isupper() else 0.53
