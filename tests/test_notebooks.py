"""The notebooks run, and their two halves (ipynb and py) are one."""

import runpy
from pathlib import Path

import jupytext
import matplotlib.pyplot as plt
import pytest

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
SOURCES = sorted(NOTEBOOKS.glob("*.py"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_every_cell_runs(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(NOTEBOOKS)
    monkeypatch.setattr(plt, "show", lambda: None)
    try:
        made = runpy.run_path(str(source))
    finally:
        plt.close("all")
    comparison = made["comparison"]
    assert len(comparison) == 4
    assert (comparison["params kept %"] <= 100).all()


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_pair_says_the_same(source: Path) -> None:
    script, notebook = jupytext.read(source), jupytext.read(source.with_suffix(".ipynb"))
    assert [cell.source for cell in script.cells] == [cell.source for cell in notebook.cells]
