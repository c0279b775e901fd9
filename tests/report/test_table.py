"""Tables: numbers in full in the CSV, readable elsewhere, and four files or none."""

import io
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from spectrim.errors import UserError
from spectrim.report.table import Column, Table, number, save


@pytest.fixture
def table() -> Table:
    data = pd.DataFrame(
        {
            "model": ["a_1", "a_1", "b"],
            "loss": [1 / 3, -0.00004, math.nan],
            "loss_std": [0.01, math.nan, math.nan],
            "share": [0.5, 1.0, 0.25],
            "why": ["holds", None, "x | y"],
        }
    )
    columns = [
        Column("model", "model"),
        Column("loss", "Δ loss", 3, signed=True),
        Column("share", "kept %", 1, scale=100),
        Column("why", "verdict"),
    ]
    return Table("small", data, columns, "A caption of 100 %", ["A note."], group="model")


def test_cells_hold_mean_and_deviation_and_a_dash_for_nothing(table: Table) -> None:
    printed = table.printed()
    assert list(printed["Δ loss"]) == ["+0.333 ± 0.010", "0.000", "–"]
    assert list(printed["kept %"]) == ["50.0", "100.0", "25.0"]
    assert list(printed["verdict"]) == ["holds", "–", "x | y"]
    assert list(printed["model"]) == ["a_1", "", "b"]


@pytest.mark.parametrize(
    ("value", "signed", "text"),
    [
        (-0.5, False, "−0.50"),
        (0.5, True, "+0.50"),
        (-0.001, True, "0.00"),
        (0.5, False, "0.50"),
        (-8.6e7, True, "−8.6e+07"),
    ],
)
def test_numbers_have_a_true_minus_and_no_negative_zero(value: float, signed: bool, text: str) -> None:
    assert number(value, 2, signed) == text


def test_csv_keeps_full_precision(table: Table) -> None:
    back = pd.read_csv(io.StringIO(table.csv()))
    pd.testing.assert_frame_equal(back, table.data, check_dtype=False, check_exact=True)


def test_markdown_has_caption_header_rows_and_notes(table: Table) -> None:
    lines = table.markdown().splitlines()
    assert lines[0] == "**A caption of 100 %**" and lines[-1] == "A note."
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 + 3
    assert {line.replace("\\|", "").count("|") for line in rows} == {5}


def test_latex_has_rules_between_groups(table: Table) -> None:
    rows = table.latex().splitlines()
    assert [rows.count(rule) for rule in ("\\toprule", "\\midrule", "\\bottomrule")] == [1, 2, 1]
    assert rows[rows.index("\\midrule", rows.index("\\midrule") + 1) + 1].startswith("b ")


def test_an_excerpt_has_few_columns_and_no_csv_of_its_own(table: Table, tmp_path: Path) -> None:
    excerpt = table.paper(["loss", "share"], table.data["model"] == "a_1", ["Another note."])
    assert list(excerpt.printed().columns) == ["Δ loss", "kept %"] and len(excerpt.data) == 2
    assert excerpt.markdown().splitlines()[-1] == "Another note."
    paths = save([table, excerpt], tmp_path, {})
    assert [path.name for path in paths if "paper" in path.name] == ["small_paper.md", "small_paper.tex"]
    with pytest.raises(AssertionError, match="at most 6 columns"):
        table.paper(["loss"] * 7)


def test_each_row_names_its_records_in_the_csv_and_links_them_in_markdown(table: Table) -> None:
    named = ["a/1 a/2", "a/1 a/2", None]
    data = table.data.assign(records=named, after=1)
    shown = replace(table, data=data)
    assert shown.csv().splitlines()[0].endswith(",after,records")
    assert list(pd.read_csv(io.StringIO(shown.csv()))["records"][:2]) == named[:2]
    first, second, third = shown.markdown().splitlines()[4:7]
    assert first.endswith("| [1](../records/a/1.json) [2](../records/a/2.json) |")
    assert second.endswith("|  |") and third.endswith("|  |")  # as the row above of the same group; none
    several = replace(shown, data=data.assign(**{str(table.group): "one"})).markdown().splitlines()[5]
    assert several.endswith("[2](../records/a/2.json) |")  # the group has rows of other records
    apart = replace(shown, group=None).markdown().splitlines()[5]
    assert apart.endswith("[2](../records/a/2.json) |")
    assert "records" not in replace(shown, excerpt=True).markdown() + shown.latex()


def test_a_column_for_the_code_is_not_in_the_csv(table: Table) -> None:
    assert "why" not in replace(table, hidden=["why"]).csv()


def test_a_table_lies_beside_its_provenance(table: Table, tmp_path: Path) -> None:
    paths = save([table], tmp_path, {"command": "python x"})
    assert [path.name for path in paths] == ["small.md", "small.tex", "small.csv", "small.provenance.json"]
    assert all(path.parent == tmp_path / "tables" and path.stat().st_size for path in paths)
    assert json.loads(paths[-1].read_text()) == {"name": "small", "command": "python x"}


def test_tables_are_written_all_or_none(table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        save([table], tmp_path, {})
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
