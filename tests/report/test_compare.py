"""Verdicts, and what differs between committed and fresh."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spectrim.errors import UserError
from spectrim.report import compare, frame
from spectrim.report.compare import Tolerance, differences, summarise, verdict

PUBLISHED = Path(__file__).parents[2] / "experiments" / "published.csv"
Make = Callable[..., Any]


@pytest.mark.parametrize(
    ("obtained", "tolerance", "word"),
    [
        (1.25, 0.25, "holds"),
        (0.75, 0.25, "holds"),
        (1.5, 0.25, "does not hold"),
        (None, 0.25, "not comparable"),
        (math.nan, 0.25, "not comparable"),
        (1.0, None, "not comparable"),
        (1.0, math.nan, "not comparable"),
    ],
)
def test_verdict(obtained: float | None, tolerance: float | None, word: str) -> None:
    judged = verdict(1.0, obtained, tolerance)
    assert judged.word == word and judged.why
    assert str(judged) == f"{word}: {judged.why}"


def test_published_numbers_are_complete_and_each_has_its_source() -> None:
    published = compare.read_published(PUBLISHED)
    assert tuple(published.columns) == compare.PUBLISHED_COLUMNS
    assert published["source"].str.fullmatch(r"[\w-]+").all()
    assert published["arxiv"].str.fullmatch(r"\d{4}\.\d{5}").all()
    assert not published.duplicated(["claim", "metric"]).any()
    assert set(published["where"]) >= {"Abstract", "Table 4", "Table 5", "Table 6", "Figure 1", "Figure 2", "Figure 3"}
    assert published[published["where"] == "Table 4"]["model"].nunique() == 7


def test_published_numbers_that_cannot_be_read_are_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        compare.read_published(tmp_path / "none.csv")
    (tmp_path / "short.csv").write_text("claim,value\nx,1\n")
    with pytest.raises(UserError, match="lacks the column source"):
        compare.read_published(tmp_path / "short.csv")


@pytest.mark.parametrize(
    ("committed", "fresh", "agree"),
    [(2.0, 2.3, True), (2.0, 2.4, False), (2.0, 1.7, True), (math.nan, math.nan, True), (math.nan, 2.0, False)],
)
def test_tolerance_is_absolute_plus_relative_to_the_committed(committed: float, fresh: float, agree: bool) -> None:
    assert Tolerance(0.1, 0.1).agree(committed, fresh) is agree


def test_the_same_records_do_not_differ(grid: Make) -> None:
    runs = frame.runs(grid())
    assert differences(runs, runs) == []
    assert summarise([], len(runs)) == 0


def test_each_cell_beyond_tolerance_and_each_missing_row_is_listed(
    record: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    committed = [record(), record("vgg11")]
    fresh = [record(change=0.5), record("mlp")]
    found = differences(frame.runs(committed), frame.runs(fresh))
    cells = {(difference.row.partition(" ")[0], difference.metric) for difference in found}
    assert {("resnet20", "test_loss"), ("resnet20", "test_accuracy"), ("vgg11", "row"), ("mlp", "row")} <= cells
    assert ("resnet20", "dense_test_loss") not in cells and ("resnet20", "params_kept") not in cells
    assert summarise(found, 2) == 1
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(found) + 1
    assert "2 runs compared" in printed[-1] and f"{len(found)} differences" in printed[-1]


def test_rows_with_the_same_key_cannot_be_compared(record: Make) -> None:
    runs = frame.runs([record(), record(calibration_seed=1)])
    with pytest.raises(UserError, match="two rows have the same model"):
        differences(runs, runs, keys=["model"])
