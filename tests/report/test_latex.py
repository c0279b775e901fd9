"""LaTeX tables: nothing unescaped, letters as large as the page allows, and every committed table compiles."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from spectrim.report import latex

TABLES = Path(__file__).resolve().parents[2] / "results" / "tables"
NUMBER = "+0.0123 ± 0.0045"


def made(columns: int, rows: int, cell: str = NUMBER, number: bool = True) -> str:
    cells = [[cell] * columns for _ in range(rows)]
    return latex.table(["head"] * columns, cells, [number] * columns, [1], "A caption of 100 %", "tab:x", ["A & note."])


def test_each_character_is_escaped_once() -> None:
    assert latex.escape("50 % of {a_b} & c − d ± ~^") == (
        r"50 \% of \{a\_\allowbreak{}b\} \& c $-$ d $\pm$ \textasciitilde{}\textasciicircum{}"
    )


def test_caption_notes_and_cells_are_escaped_and_a_number_is_not_broken() -> None:
    text = made(2, 2)
    assert r"\caption{A caption of 100 \%}" in text and r"A \& note." in text
    assert r"+0.0123~$\pm$~0.0045" in text and text.isascii()
    assert text.splitlines().count(r"\midrule") == 2  # below the head, and above the second row


@pytest.mark.parametrize(
    ("columns", "rows", "parts"),
    [
        (2, 5, ["{table}", "normalsize"]),
        (4, 5, ["{table}", "small"]),
        (2, 100, ["{longtable}", "normalsize"]),
        (6, 5, ["{table}", "normalsize", "+0.0123 $\\pm$~0.0045"]),
        (6, 16, ["{longtable}", "normalsize", "+0.0123 $\\pm$~0.0045"]),
        (7, 5, ["{landscape}", "{longtable}", "footnotesize"]),
        (10, 5, ["{landscape}", "footnotesize", "+0.0123 $\\pm$~0.0045"]),
    ],
)
def test_letters_are_as_large_as_the_page_allows(columns: int, rows: int, parts: list[str]) -> None:
    text = made(columns, rows)
    assert all(part in text for part in parts)
    assert ("{longtable}" in text) == ("{table}" not in text)
    assert ("{landscape}" in text) == ("{landscape}" in parts)
    widths = [float(width) for width in re.findall(r"p{([0-9.]+)\\linewidth}", text)]
    line = latex.LANDSCAPE_LINE if "landscape" in text else latex.LINE
    assert len(widths) == columns and sum(widths) + 2 * latex.GAP * (columns - 1) / line <= 1.0


def test_text_is_wrapped_where_it_is_long() -> None:
    words = "a cell of many words that no page is wide enough for, were it not broken into lines " * 3
    assert "{landscape}" not in made(2, 2, words, number=False)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
@pytest.mark.parametrize("path", sorted(TABLES.glob("*.tex")), ids=lambda path: path.stem)
def test_a_committed_table_compiles_and_fits_the_page(path: Path, tmp_path: Path) -> None:
    source = (
        r"\documentclass{article}\usepackage[T1]{fontenc}\usepackage{lmodern}"
        r"\usepackage{array,booktabs,longtable,pdflscape}\begin{document}\input{" + str(path) + r"}\end{document}"
    )
    (tmp_path / "one.tex").write_text(source)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "one.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert re.findall("Overfull.*|Float too large.*", done.stdout) == []
