"""The table beside a figure: the runs it may be made of, its columns, and what it leaves out."""

from pathlib import Path
from typing import Any

import pytest

from spectrim.errors import UserError
from spectrim.report import averages, command, figure_data, frame


def options(folder: Path) -> command.Options:
    return command.parse("figure1", "table2", "", ["--records", str(folder)])


def test_only_runs_of_the_algorithms_asked_for_are_taken(record: Any, tmp_path: Path) -> None:
    found = [record(algorithm="truncation"), record(algorithm="lossless"), record(algorithm="probe")]
    assert set(command.runs(options(tmp_path), found, ["truncation", "compact"])["algorithm"]) == {"truncation"}
    with pytest.raises(UserError, match="hold no run of truncation, lossless or compact$"):
        command.runs(options(tmp_path), found[2:], frame.METHODS)
    with pytest.raises(UserError, match="hold no run of truncation$"):
        command.runs(options(tmp_path), found[1:], ["truncation"])


def test_the_table_has_the_values_in_their_order_and_names_what_is_missing(record: Any, tmp_path: Path) -> None:
    found = [record("vgg11", "truncation"), record("densenet22", "truncation")]
    values = ("params_kept", "test_loss")
    rows = averages.with_dense(frame.runs(found), values)
    table = figure_data.table(
        options(tmp_path), rows, values, "What is shown", ["A note."], ("densenet", "resnet", "vgg")
    )
    assert [column.key for column in table.columns] == ["model", "method", *values, "n"]
    assert table.caption == f"What is shown on {found[0]['names']['data']}"
    assert table.notes == ["A note.", "There are no records of: resnet."]
