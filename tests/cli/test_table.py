"""The command that builds a table: its help, its version, and where it takes records from."""

import subprocess
import sys
from pathlib import Path

import pytest

import spectrim
from spectrim.cli import table
from spectrim.cli.termination import STATUS, Terminated
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


def test_without_a_name_only_the_name_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        table.main([])
    assert end.value.code == 2 and "arguments are required: NAME;" in capsys.readouterr().err


def test_a_reader_that_ends_costs_no_table(tmp_path: Path) -> None:
    command = f"{sys.executable} -m spectrim.cli.table table8 --out {tmp_path} | true; echo ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (ended.stdout, ended.stderr) == ("0\n", "") and (tmp_path / "tables" / "table8.csv").is_file()


@pytest.mark.parametrize(
    ("stop", "word", "status"), [(KeyboardInterrupt, "interrupted", 130), (Terminated, "terminated", STATUS)]
)
def test_a_stop_is_told_in_one_line(
    stop: type[KeyboardInterrupt],
    word: str,
    status: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fetched(given: str) -> Path:
        raise stop

    monkeypatch.setattr(release, "records", fetched)
    assert table.main(["table8", "--fetch"]) == status
    assert capsys.readouterr().err == f"spectrim-table: {word}; give the same command again\n"


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
