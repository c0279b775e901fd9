"""How far a grid is: what is done, what failed and why, what is missing, and the hours that it takes."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spectrim.algorithms.bound_probe import BoundProbe
from spectrim.cli import commands, grid, run_lock, status, termination
from spectrim.cli.termination import Terminated
from spectrim.errors import UserError
from spectrim.records import records
from spectrim.runs import cells

QUIET = ["hydra/job_logging=none", "hydra/hydra_logging=none"]  # handlers would outlive a test's streams
GRID = "table8/bounds_untrained"


def told(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, list[str]]:
    """Exit status and lines of the command."""
    capsys.readouterr()
    ended = grid.main(["status", *arguments])
    captured = capsys.readouterr()
    return ended, (captured.out + captured.err).splitlines()


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``sweep(words)``: run a part of the grid."""

    def swept(*words: str) -> None:
        monkeypatch.setattr(
            sys, "argv", ["spectrim", "-m", f"experiment={GRID}", f"records={tmp_path}", *words, *QUIET]
        )
        commands.compress()

    return swept


def test_a_failed_cell_is_told_with_its_reason_until_it_succeeds(
    sweep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    usual = BoundProbe.measure

    def failing(self: BoundProbe, model: Any, *given: Any) -> Any:
        if len(list(model.parameters())) > 2:
            raise UserError("no luck with deep nets")
        return usual(self, model, *given)

    with monkeypatch.context() as patched:
        patched.setattr(BoundProbe, "measure", failing)
        with pytest.raises(SystemExit):
            sweep("model.depth=2,3", "seed=0")
    assert len(records.read_all(tmp_path, "table8")) == 1  # a note is no record
    ended, lines = told(capsys, GRID, "--records", str(tmp_path))
    assert ended == 1 and len(lines) == 16
    assert re.fullmatch(f"{GRID}: 1 of 15 cells done, 1 failed, 13 missing, 0.00 hours left", lines[0])
    assert re.fullmatch(r"  done    model.depth=2 seed=0 \(\d+ s\)", lines[1])
    assert lines[2] == "  missing model.depth=2 seed=1"
    assert lines[4] == "  failed  model.depth=3 seed=0: no luck with deep nets"
    (note,) = tmp_path.rglob("*.failed.json")
    assert json.loads(note.read_text()) == {"reason": "no luck with deep nets"}

    capsys.readouterr()
    folder = ["--records", str(tmp_path)]
    assert grid.main(["failed", GRID, *folder]) == 1
    command = f"spectrim experiment={GRID} model.depth=3 seed=0 records={tmp_path}"
    assert capsys.readouterr().out == f"{GRID} model.depth=3 seed=0: no luck with deep nets\n  {command}\n"

    assert grid.main(["rerun", GRID, *folder]) == 0
    assert f"1 of 1: {command}\n{GRID}: 1 of 1 failed cells succeeded\n" in capsys.readouterr().out
    assert grid.main(["failed", GRID, *folder]) == 0
    assert not list(tmp_path.rglob("*.failed.json"))
    assert told(capsys, GRID, "--records", str(tmp_path))[1][4].startswith("  done    model.depth=3 seed=0 (")


def test_a_single_run_that_fails_leaves_no_note(
    tmp_path: Path, digits: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["spectrim", *digits, "algorithm=truncation", "algorithm.ratio=2", *QUIET])
    with pytest.raises(SystemExit):
        commands.compress()
    assert "ratio must lie in" in capsys.readouterr().err and not list(tmp_path.rglob("*.json"))


def test_a_grid_of_committed_records_is_done(capsys: pytest.CaptureFixture) -> None:
    ended, lines = told(capsys, "table8", "--records", "results/records")
    assert ended == 0
    assert lines == [
        "table8/bounds: 15 of 15 cells done",
        "table8/bounds_untrained: 15 of 15 cells done",
        "table8/rank_selection: 60 of 60 cells done",
    ]


def test_a_missing_checkpoint_and_a_damaged_record_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "table8"
    folder.mkdir()
    for path in sorted(Path("results/records/table8").glob("*.json")):
        (folder / path.name).write_text("{")
    lines = told(capsys, GRID, "--records", str(tmp_path))[1]
    assert lines[0].startswith(f"{GRID}: 0 of 15 cells done, 15 failed")
    assert all(line.endswith(".json is damaged: delete it") for line in lines[1:])
    monkeypatch.chdir(tmp_path)
    lines = told(capsys, "table8/bounds")[1]
    assert lines[0] == "table8/bounds: 0 of 15 cells done, 15 missing, hours left unknown"
    assert lines[1].endswith(
        ": its checkpoint results/checkpoints/table8/bias_free_mlp2-digits-seed0.safetensors is missing"
    )


@pytest.mark.parametrize(
    "content", [b"[1]", b"7", b"\xff\xfe", b"[" * 100_000, b'{"phases": 3}', b'{"phases": {"a": {"seconds": "x"}}}']
)
def test_a_record_that_holds_anything_else_is_damaged(content: bytes, tmp_path: Path) -> None:
    cell = cells.Cell(("seed=0",), "table8", "0" * 16, None)
    path = records.path_of(tmp_path, cell.experiment, cell.signature)
    path.parent.mkdir()
    path.write_bytes(content)
    assert status.state_of(cell, tmp_path) == status.State("failed", f"{path} is damaged: delete it")


def test_a_cell_that_runs_is_told_with_its_process(tmp_path: Path) -> None:
    cell = cells.Cell(("seed=0",), "table8", "0" * 16, None)
    path = records.path_of(tmp_path, cell.experiment, "0" * 16)
    records.failure_path(path).parent.mkdir()
    records.failure_path(path).write_text('{"reason": "an earlier one"}')
    assert status.state_of(cell, tmp_path).word == "failed"
    with run_lock.locked(path, wait=False):
        state = status.state_of(cell, tmp_path)
        assert state.word == "running" and status.line(cell, state).startswith("  running seed=0: by process ")
        assert status.summary("g", [state]) == "g: 0 of 1 cells done, 1 running, hours left unknown"


def test_a_damaged_record_is_made_anew_and_kept_aside(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ((_, stand),) = list(grid._states(GRID, tmp_path))
    signature = str(stand[0][0].signature)
    path = records.path_of(tmp_path, "table8", signature)
    path.parent.mkdir()
    path.write_text("{")
    assert grid.main(["rerun", GRID, "--records", str(tmp_path)]) == 0
    assert path.with_suffix(".damaged").read_text() == "{"
    capsys.readouterr()
    assert grid.main(["diff", str(path), signature[:10], "--records", "results/records"]) == 1
    said = capsys.readouterr().out
    assert "\nprovenance.time_utc: " in said and "config." not in said
    assert grid.main(["diff", str(path), str(path)]) == 0 and capsys.readouterr().out == ""


def test_the_hours_are_those_of_the_cells_that_are_left() -> None:
    done, same, new = (
        status.State("done", seconds=1800.0),
        status.State("missing", seconds=5400.0),
        status.State("failed"),
    )
    assert status.hours_left([done, done]) == 0
    assert status.hours_left([done, same]) == 1.5
    assert status.hours_left([done, same, new]) == 1.5 + 1.0
    assert status.hours_left([new]) is None


@pytest.mark.parametrize(
    ("stop", "status", "word"), [(KeyboardInterrupt, 130, "interrupted"), (Terminated, 143, "terminated")]
)
def test_a_stop_is_told_in_one_line(
    stop: type, status: int, word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def stopped(*_: Any) -> None:
        assert signal.getsignal(signal.SIGTERM) is termination._raise  # SIGTERM would end it so
        raise stop

    monkeypatch.setattr(grid, "_failed", stopped)
    assert grid.main(["rerun", GRID]) == status
    assert capsys.readouterr().err == f"spectrim-grid: {word}; the same command goes on where it stopped\n"


def test_an_unknown_grid_is_one_line(capsys: pytest.CaptureFixture) -> None:
    ended, lines = told(capsys, "table9/refits")
    assert ended == 1 and len(lines) == 1
    assert lines[0].startswith("spectrim-grid: experiment=table9/refits is no grid: choose table9/refit")


def test_it_does_not_load_torch() -> None:
    command = [sys.executable, "-c", "import sys, spectrim.cli.grid; print(*sys.modules)"]
    modules = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert not modules & {"torch", "torchvision", "pandas", "wandb"}


def test_a_wrong_word_is_one_line(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        grid.main(["statu", GRID])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and "invalid choice: 'statu'" in error


def test_a_reader_that_ends_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert grid.main(["failed", GRID, "--records", str(tmp_path)]) == 0
