"""Tracking: what W&B is told, and that nothing it does stops a run."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from spectrim.cli import run
from spectrim.errors import UserError
from spectrim.runs import tracking
from spectrim.runs.tracking import NoTracking, WandB
from spectrim.tools import files

RANKS = pd.DataFrame({"layer": ["conv1", "fc"], "rank": [3, None], "shape": ["[4, 3, 3, 3]", "[10, 4]"]})


class FakeRun:
    """Takes what a W&B run takes and keeps it."""

    def __init__(self) -> None:
        self.logged: list[Mapping[str, Any]] = []
        self.axes: dict[str, str] = {}
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None

    def define_metric(self, name: str, step_metric: str) -> None:
        assert name not in self.axes
        self.axes[name] = step_metric

    def log(self, data: Mapping[str, Any]) -> None:
        self.logged.append(data)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture(autouse=True)
def _not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking._Followed, "given_up", False)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    run = FakeRun()
    monkeypatch.setattr(WandB, "start", lambda *_: run)
    return run


def follow(tracker: NoTracking | WandB, signature: str = "0123456789abcdef") -> None:
    """One run from beginning to end."""
    with tracker.run(signature, "table2", "lossless", {"seed": 0}) as run:
        run.table("layers", RANKS)
        run.log({"layer": "conv1", "rank": 3, "measured": 0.5}, 0)
        run.log({"layer": "conv1", "rank": 2, "measured": 0.7}, 1)
        run.summary({"test_loss": 1.25})


def test_no_tracking_takes_everything_and_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    follow(NoTracking())
    assert capfd.readouterr() == ("", "")


def test_numbers_are_drawn_against_step_and_rank(fake: FakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Table=lambda columns, data: (columns, data.tolist())))
    follow(WandB())
    table, first, second = fake.logged
    assert table == {"layers": (["layer", "rank", "shape"], [["conv1", 3.0, "[4, 3, 3, 3]"], ["fc", None, "[10, 4]"]])}
    assert first == {"rank": 3, "measured": 0.5, "step": 0, "against rank/conv1/measured": 0.5}
    assert second["step"] == 1
    assert fake.axes == {"rank": "step", "measured": "step", "against rank/conv1/measured": "rank"}
    assert fake.summary == {"test_loss": 1.25}
    assert fake.exit_code == 0


def test_numbers_by_name_get_a_curve_each(fake: FakeRun) -> None:
    with WandB().run("1a2b3c", "table5", "svd_training", {}) as run:
        run.log({"rank": 7, "ranks": {"conv1": 3, "fc": 4}, "bisection": [{"delta": 0.5}]}, 2)
    assert fake.logged == [{"rank": 7, "ranks/conv1": 3, "ranks/fc": 4, "step": 2}]
    assert fake.axes == {"rank": "step", "ranks/conv1": "step", "ranks/fc": "step"}


def test_a_run_that_fails_is_marked_as_failed_and_its_error_goes_on(fake: FakeRun) -> None:
    with pytest.raises(KeyboardInterrupt), WandB().run("0" * 16, "table2", "lossless", {}):
        raise KeyboardInterrupt
    assert fake.exit_code == 1


@pytest.mark.parametrize("error", [OSError("the server is away\nfor long"), RuntimeError()])
def test_a_failing_start_costs_one_line_in_a_process(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tries = []

    def start(*arguments: Any) -> None:
        tries.append(arguments)
        raise error

    monkeypatch.setattr(WandB, "start", start)
    follow(WandB())
    follow(WandB())
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("spectrim: warning: W&B tracking is off from here on: ")
    assert err.count("\n") == 1
    assert len(tries) == 1


@pytest.mark.parametrize("broken", ["log", "define_metric", "finish"])
def test_a_failure_in_the_middle_or_at_the_end_costs_one_line(
    broken: str, fake: FakeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise TimeoutError("no answer")

    monkeypatch.setattr(fake, broken, fail)
    follow(WandB())
    assert capsys.readouterr().err == "spectrim: warning: W&B tracking is off from here on: no answer\n"


def test_without_the_package_a_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    follow(WandB(dir=str(tmp_path)))
    assert "tracking is off" in capsys.readouterr().err


def test_error_reports_which_look_up_a_host_are_off_before_the_import(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "as before")  # so that it is put back at the end
    monkeypatch.delenv("WANDB_ERROR_REPORTING")
    monkeypatch.setitem(sys.modules, "wandb", None)
    follow(WandB(dir=str(tmp_path)))
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"


@pytest.mark.parametrize("setting", [{"mode": "on"}, {"project": 3}])
def test_a_wrong_setting_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(setting))):
        WandB(**setting)


class TestWhatARunTells:
    """A run is told to the tracker once, after it is recorded; whatever the tracker does, the record is there."""

    @pytest.fixture
    def told(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
        """What W&B was given; it cannot be reached while the list holds "away"."""
        said: list[Any] = []

        def start(_: WandB, signature: str, *rest: Any) -> Any:
            if "away" in said:
                raise OSError("no server")
            said.append(signature)
            return SimpleNamespace(
                define_metric=lambda *_, **__: None, log=said.append, summary={}, finish=lambda exit_code: None
            )

        monkeypatch.setattr(WandB, "start", start)
        return said

    def test_a_run_is_told_once(self, compose: Any, digits: list[str], told: list) -> None:
        asked = (*digits, "algorithm=truncation", "tracking=wandb")
        record = run.run(compose(*asked))
        table = told[1]["layers"]
        assert told[0] == record["signature"] and len(told) == 2
        assert table.columns[0] == "layer" and [row[0] for row in table.data] == [
            one["layer"] for one in record["layers"]
        ]
        assert [row[table.columns.index("rank")] for row in table.data] == [one["rank"] for one in record["layers"]]
        run.run(compose(*asked))
        assert len(told) == 2

    def test_what_the_server_missed_it_is_told_by_the_same_command(
        self, compose: Any, digits: list[str], told: list, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = (*digits, "algorithm=truncation", "tracking=wandb")
        told.append("away")
        record = run.run(compose(*asked))
        assert told == ["away"]
        told.clear()
        monkeypatch.setattr(tracking._Followed, "given_up", False)  # another process
        assert run.run(compose(*asked)) == json.loads(json.dumps(record))
        assert told[0] == record["signature"]

    def test_what_was_made_without_tracking_is_told_later(self, compose: Any, digits: list[str], told: list) -> None:
        asked = (*digits, "algorithm=truncation")
        record = run.run(compose(*asked))
        assert not told
        run.run(compose(*asked, "tracking=wandb"))
        assert told[0] == record["signature"]

    def test_a_mark_that_cannot_be_written_fails_no_run(
        self, compose: Any, digits: list[str], told: list, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usual = files.write

        def full(contents: Any) -> None:
            if any(path.suffix == ".tracked" for path in contents):
                raise UserError("no room")
            usual(contents)

        monkeypatch.setattr(files, "write", full)
        assert run.run(compose(*digits, "algorithm=truncation", "tracking=wandb"))["signature"] == told[0]


# In processes of their own: W&B starts a service and keeps its state for as long as a process lives.
FOLLOW = """
import sys
import pandas as pd
from spectrim.runs.tracking import WandB
with WandB(mode=sys.argv[1], dir=sys.argv[2]).run("0123456789abcdef", "table2", "lossless", {"seed": 0}) as run:
    run.table("layers", pd.DataFrame({"layer": ["conv1", "fc"], "rank": [3, None]}))
    run.log({"layer": "conv1", "rank": 3, "measured": 0.5}, 0)
    run.summary({"test_loss": 1.25})
print("the run went on")
"""


def in_process(mode: str, folder: Path) -> subprocess.CompletedProcess[str]:
    # No account and no other settings of the person who runs the tests.
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "NETRC"))}
    home = {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "WANDB_ERROR_REPORTING": "false"}
    command = [sys.executable, "-c", FOLLOW, mode, str(folder / "out")]
    return subprocess.run(command, env=kept | home, cwd=folder, capture_output=True, text=True, timeout=120, check=True)


def test_an_offline_run_lies_below_the_folder(tmp_path: Path) -> None:
    done = in_process("offline", tmp_path)
    (log,) = (tmp_path / "out" / "wandb").glob("offline-run-*-0123456789abcdef/*.wandb")
    written = log.read_bytes()
    assert all(word in written for word in (b"table2", b"lossless", b"against rank/conv1/measured", b"test_loss"))
    assert (done.stdout, done.stderr) == ("the run went on\n", "")


def test_nobody_is_asked_to_log_in(tmp_path: Path) -> None:
    done = in_process("online", tmp_path)
    assert done.stdout == "the run went on\n"
    assert done.stderr.count("\n") == 1
    assert "wandb login" in done.stderr
