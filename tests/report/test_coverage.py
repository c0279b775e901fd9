"""Coverage: a table says how many of its runs are missing, and refuses records that are of no grid."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spectrim.errors import UserError
from spectrim.records import records
from spectrim.report import command, coverage
from spectrim.report.table import Column, Table, save

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(record: Callable[..., Any], tmp_path: Path) -> Path:
    """Write an index of three runs of Table 2, one of them also in Figure 1, and the records of the first two."""
    made = [record(seed=seed) for seed in range(3)]
    rows = [
        ["table2", one["signature"], "table2/a", "table2 figure1" if not at else "table2"]
        for at, one in enumerate(made)
    ]
    (tmp_path / "cells.csv").write_text("\n".join(map(",".join, [coverage.COLUMNS, *rows])) + "\n")
    for one in made[:2]:
        records.write(tmp_path, one)
    return tmp_path


def test_missing_runs_are_counted(folder: Path) -> None:
    found = coverage.of("table2", "table2", folder, folder / "cells.csv")
    assert (found.expected, found.missing, found.note) == (3, 1, "1 of 3 runs missing.")
    assert coverage.of("my_table", "mine", folder, folder / "cells.csv") == coverage.Coverage(0, 0)


def test_a_record_of_no_grid_of_the_table_is_refused_and_named(folder: Path, record: Callable[..., Any]) -> None:
    stray = records.write(folder, record(seed=7))
    with pytest.raises(UserError, match=f"1 records of table2 belong to no grid of table2, such as .*{stray.name}"):
        coverage.of("table2", "table2", folder, folder / "cells.csv")
    stray.unlink()
    # A figure that shows one run of an experiment is not made of the others.
    with pytest.raises(UserError, match="belong to no grid of figure1"):
        coverage.of("figure1", "table2", folder, folder / "cells.csv")


@pytest.mark.parametrize(("more", "status"), [([], 1), (["--partial"], 0)])
def test_a_table_that_lacks_runs_says_so_and_fails_unless_that_is_allowed(
    more: list[str], status: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(options: command.Options) -> list[Path]:
        found = command.load(options)
        rows = command.runs(options, found, ["lossless"])[["model"]]
        table = Table(options.name, rows, [Column("model", "model")], "A caption", ["A note."])
        return save([table], options.out, command.origin(options, found))

    given = ["--records", str(folder), "--out", str(folder), "--index", str(folder / "cells.csv"), *more]
    assert command.run(build, "table2", "table2", given) == status
    assert "table2: 1 of 3 runs missing" in capsys.readouterr().err
    assert (folder / "tables/table2.md").read_text().splitlines()[-3:] == ["1 of 3 runs missing.", "", "A note."]


@pytest.mark.parametrize("text", ["experiment,signature\ntable2,0\n", "experiment,signature,grid,shown_in\ntable2,0\n"])
def test_an_index_that_cannot_be_read_names_the_command_that_makes_it(text: str, tmp_path: Path) -> None:
    (tmp_path / "cells.csv").write_text(text)
    with pytest.raises(UserError, match="make index"):
        coverage.read(tmp_path / "cells.csv")


def test_the_committed_records_are_those_of_the_committed_index() -> None:
    with (ROOT / "results/index/cells.csv").open(newline="") as stream:
        known = {(row["experiment"], row["signature"]) for row in csv.DictReader(stream)}
    folder = ROOT / "results/records"
    assert known == {(str(path.parent.relative_to(folder)), path.stem) for path in folder.rglob("*.json")}
