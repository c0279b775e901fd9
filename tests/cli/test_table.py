"""The command that builds a table: its help, its version, and where it takes records from."""

from pathlib import Path

import pytest

import spectrim
from spectrim.cli import table
from spectrim.fetch import release


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for word, said in (("--help", "usage: spectrim-table NAME"), ("--version", spectrim.__version__)):
        with pytest.raises(SystemExit) as end:
            table.main([word])
        assert end.value.code == 0 and said in capsys.readouterr().out


def test_the_options_of_a_script_are_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        table.main(["table2", "--help"])
    assert end.value.code == 0 and "--partial" in capsys.readouterr().out


def test_an_unknown_table_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        table.main(["table99"])
    assert end.value.code == 2 and "invalid choice: 'table99'" in capsys.readouterr().err


def test_without_a_release_one_line_says_what_to_set(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(release.ADDRESS, raising=False)
    assert table.main(["table2", "--fetch"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("spectrim-table: no release is known: set SPECTRIM_RELEASE") and said.count("\n") == 1


def test_a_table_is_built_from_the_records_of_a_release(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(release, "records", lambda given: Path("results/records") if given == "here" else None)
    assert table.main(["table8", "--out", str(tmp_path), "--fetch", "here"]) == 0
    made, committed = (folder / "tables" / "table8.csv" for folder in (tmp_path, Path("results")))
    assert made.read_bytes() == committed.read_bytes()
    assert str(made) in capsys.readouterr().out
