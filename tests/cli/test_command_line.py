"""A grid of runs, one after the other or by joblib: what fails is named, what was stopped goes on where it was."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.errors import ConfigCompositionException

from spectrim.cli import command_line, commands, messages, run, run_lock
from spectrim.errors import UserError
from spectrim.records import records
from spectrim.runs import composition, configuration
from spectrim.runs.configuration import innermost

QUIET = ["hydra/job_logging=none", "hydra/hydra_logging=none"]  # handlers would outlive a test's streams
SOURCE = str(Path(configuration.__file__).parents[2])
LAUNCHERS = (["hydra/launcher=basic"], ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"])


def started(arguments: list[str], folder: Path, stdout: int = subprocess.DEVNULL) -> subprocess.Popen:
    """The command as a process."""
    environment = os.environ | {"PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}
    environment.pop("HYDRA_FULL_ERROR", None)
    command = [sys.executable, "-m", "spectrim.cli.run", *arguments]
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, and inherited so, in a background job
    try:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, usual)


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """Exit status, and what was said on stderr, once it and all that it started are gone: each holds the pipe."""
    _, said = process.communicate(timeout=300)
    return process.returncode, said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=nosuch"], "spectrim: model=nosuch is unknown; known are bias_free_mlp, cct2, densenet22"),
        (
            ["model=densnet22"],
            "spectrim: model=densnet22 is unknown (did you mean densenet22?); known are bias_free_mlp",
        ),
        (
            ["algorithm=joint", "algorithm.param_kept=1"],
            "spectrim: algorithm.param_kept is no setting; did you mean algorithm.params_kept?",
        ),
        (["model._target_=os.system", "algorithm=truncation"], "spectrim: config.model._target_=os.system"),
        (["--mistyped"], "spectrim: --mistyped is no option; --help lists the options"),
        (["--multrun"], "spectrim: --multrun is no option (did you mean --multirun?); --help lists the options"),
    ],
)
def test_the_command_itself_ends_in_one_line(
    overrides: list[str], message: str, digits: list[str], tmp_path: Path
) -> None:
    status, said = ended(started([*digits, *overrides, "--multirun"], tmp_path))
    assert status == 1
    assert message in said and said.count("\n") == 1


def test_a_letter_that_the_locale_does_not_know_is_told_in_one_line(digits: list[str], tmp_path: Path) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "spectrim.cli.run", *digits, "model=nosüch"]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **plain}, capture_output=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.startswith(b"spectrim: ") and b"model=nos" in done.stderr and done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("setting", ["hydra.sweep.dir=wall/hydra", "hydra.launcher.n_jobs=0"])
def test_a_grid_that_cannot_begin_ends_in_one_line(
    setting: str, digits: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "wall").write_text("a file, not a folder")
    with pytest.raises(SystemExit) as ending:
        in_process([*digits, "algorithm.gamma=1,2", "hydra/launcher=joblib", setting], monkeypatch, tmp_path)
    said = capsys.readouterr().err
    assert ending.value.code == 1
    assert said.startswith("spectrim: Hydra cannot begin with these settings: ") and said.count("\n") == 1
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=["basic", "joblib"])
def test_the_runs_that_failed_are_counted_and_named_and_the_others_are_recorded(
    launcher: list[str], digits: list[str], tmp_path: Path
) -> None:
    words = ["-m", *digits, "algorithm=truncation", "algorithm.ratio=2,0.4,0,0.6", *launcher]
    status, said = ended(started(words, tmp_path))
    assert status == 1 and said.count("\n") == 1
    assert said.startswith("spectrim: 2 runs failed: ratio must lie in (0, 1], got 2 (in spectrim data=digits ")
    assert "algorithm.ratio=2); ratio must lie in (0, 1], got 0 (in spectrim data=digits " in said
    assert said.endswith("algorithm.ratio=0)\n")
    assert {one["config"]["algorithm"]["ratio"] for one in records.read_all(tmp_path, "runs")} == {0.4, 0.6}


def in_process(arguments: list[str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["spectrim", "-m", *arguments, *QUIET])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.chdir(folder)
    commands.compress()


def test_a_single_failed_run_is_named(
    digits: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        in_process([*digits, "algorithm=truncation", "algorithm.ratio=2,0.4"], monkeypatch, tmp_path)
    said = capsys.readouterr().err
    assert said.startswith("spectrim: ratio must lie in (0, 1], got 2 (in spectrim ") and said.count("\n") == 1
    assert len(records.read_all(tmp_path, "runs")) == 1


def test_a_fault_of_ours_in_a_grid_is_shown_in_full_and_named(
    digits: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    usual = run.run

    def faulty(cfg: Any) -> dict[str, Any]:
        return usual(cfg) if cfg.algorithm.ratio > 0.5 else {"ratio": 1 / 0}

    monkeypatch.setattr(run, "run", faulty)
    with pytest.raises(SystemExit) as ending:
        in_process([*digits, "algorithm=truncation", "algorithm.ratio=2,0.4,0.6,0.5"], monkeypatch, tmp_path)
    said = capsys.readouterr().err
    assert ending.value.code == 1 and said.count("Traceback") == 1 and "in faulty" in said
    last = said.splitlines()[-1]
    assert last.startswith("spectrim: 3 runs failed: ratio must lie in (0, 1], got 2 (in spectrim ")
    assert last.count("; ZeroDivisionError: division by zero (in spectrim ") == 2
    assert len(records.read_all(tmp_path, "runs")) == 1


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=["basic", "joblib"])
def test_a_grid_that_was_killed_and_interrupted_goes_on_where_it_stopped(
    launcher: list[str],
    tmp_path: Path,
    digits: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    def asked(cells: int) -> list[str]:
        ratios = ",".join(f"{0.2 + 0.02 * i:.2f}" for i in range(cells))
        return [*digits, "model.hidden=[300,300]", "algorithm=truncation", f"algorithm.ratio={ratios}"]

    def recorded() -> dict[str, tuple[int, int]]:
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tmp_path.glob("runs/*.json")}

    def stopped_by(which: signal.Signals, at_least: int) -> tuple[int, str]:
        # So many, of so large a net, that on a busy machine, too, the signal does not come after the last.
        process = started(["-m", *asked(40), *QUIET, *launcher], tmp_path)
        while len(recorded()) < at_least and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(which)
        return ended(process)

    assert stopped_by(signal.SIGKILL, 2)[0] == -signal.SIGKILL
    after_kill = recorded()
    status, said = stopped_by(signal.SIGINT, len(after_kill) + 1)
    after_interrupt = recorded()
    (line,) = [line for line in said.splitlines() if not line.endswith("done already")]
    assert status == 130 and line == "spectrim: interrupted; the same command goes on where it stopped"
    assert 2 <= len(after_kill) < len(after_interrupt)
    assert len(records.read_all(tmp_path, "runs")) == len(after_interrupt)  # each of them whole

    cells = len(after_interrupt) + 5  # joblib does not keep to their order, but nearly
    in_process(asked(cells), monkeypatch, tmp_path)  # by whichever launcher
    assert f"spectrim: {len(after_interrupt)} of {cells} cells are done already\n" in capsys.readouterr().err
    assert len(recorded()) == cells == len(records.read_all(tmp_path, "runs"))
    assert after_kill.items() <= after_interrupt.items() <= recorded().items()


def test_a_grid_that_is_started_twice_at_once_computes_each_cell_once(digits: list[str], tmp_path: Path) -> None:
    words = ["-m", *digits, "model.hidden=[300,300]", "algorithm=truncation", "algorithm.ratio=0.2,0.3,0.4", "seed=0,1"]
    both = [started(words, tmp_path, subprocess.PIPE) for _ in range(2)]
    told = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum(out.count(" params kept ") for out, _ in told) == 6 == len(records.read_all(tmp_path, "runs"))
    assert {path.suffix for path in (tmp_path / "runs").iterdir()} == {".json"}


def test_a_cell_that_another_process_computes_is_left_to_it_and_waited_for(
    digits: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = [*digits, "algorithm=truncation", "algorithm.ratio=0.4,0.6"]
    usual, claimed, waited = run_lock.locked, list[Path](), list[Path]()

    def taken(result: Path, wait: bool) -> Any:
        claimed.append(result)
        if len(claimed) == 1:
            raise run_lock.Elsewhere("by a neighbour", result)
        return usual(result, wait)

    monkeypatch.setattr(run_lock, "locked", taken)
    monkeypatch.setattr(run_lock, "wait_for", waited.append)
    in_process(words, monkeypatch, tmp_path)
    said, line = capsys.readouterr(), r"\[{} of 2.*\] mlp/digits truncation \(algorithm.ratio={}\): params kept "
    assert re.search(line.format(1, 0.6), said.out) and re.search(line.format(2, 0.4), said.out)
    assert f"spectrim: {claimed[0]} is computed by a neighbour; going on with the next run\n" in said.err
    assert waited == [claimed[0]] == [claimed[2]] and len(records.read_all(tmp_path, "runs")) == 2


@pytest.mark.parametrize("left", [False, True], ids=["recorded there", "left there"])
def test_a_grid_with_a_failed_cell_waits_for_the_others_too(
    left: bool, digits: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    usual, tried, waited = run_lock.locked, list[Path](), list[Path]()

    def taken(result: Path, wait: bool) -> Any:
        tried.append(result)
        if len(tried) == 1:
            raise run_lock.Elsewhere("by a neighbour", result)
        if len({*tried}) == 2 and result != tried[0]:
            raise UserError("this one fails")
        return usual(result, wait)

    def end(result: Path) -> None:
        waited.append(result)
        if not left:
            result.parent.mkdir(parents=True, exist_ok=True)
            result.write_text("{}")

    monkeypatch.setattr(run_lock, "locked", taken)
    monkeypatch.setattr(run_lock, "wait_for", end)
    with pytest.raises(SystemExit) as ending:
        in_process([*digits, "algorithm=truncation", "algorithm.ratio=0.4,0.6"], monkeypatch, tmp_path)
    assert ending.value.code == 1 and waited == [tried[0]]
    assert "waiting for 1 runs that other processes compute\n" in (said := capsys.readouterr().err)
    assert said.splitlines()[-1].startswith("spectrim: this one fails (in ")
    # What the neighbour left is computed; the failed cell is tried again only then.
    assert tried == [tried[0], tried[1]] + ([tried[0], tried[1]] if left else [])
    assert len(records.read_all(tmp_path, "runs")) == 1 if left else tried[0].read_text() == "{}"


@pytest.mark.parametrize("option", ["--quiet", "--verbose"])
def test_a_grid_says_as_much_as_it_is_asked_to(
    option: str, digits: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    in_process([*digits, "algorithm=truncation", "algorithm.ratio=0.4,0.6", option], monkeypatch, tmp_path)
    said = capsys.readouterr()
    if option == "--quiet":
        assert said.out == said.err == ""
    else:
        assert said.out.count(" params kept ") == 2 and said.err.count("spectrim: select: ") == 2
    assert messages.LEVEL not in os.environ and composition.FOLDER not in os.environ


def test_a_run_given_again_says_its_result_and_where_its_record_is(digits: list[str], tmp_path: Path) -> None:
    said = []
    for word in ("recorded", "already recorded"):
        process = started([*digits, "algorithm=truncation"], tmp_path, subprocess.PIPE)
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0
        (path,) = (tmp_path / "runs").glob("*.json")
        assert error == f"spectrim: {word} in {path}\n"
        said.append(out)
    assert said[0] == said[1] and "params kept" in said[0] and said[0].count("\n") == 1


def test_a_process_of_joblib_leaves_ctrl_c_and_sigterm_to_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    stops = signal.SIGINT, signal.SIGTERM
    usual = [signal.getsignal(stop) for stop in stops]
    try:
        with command_line.cell("spectrim"):
            assert [signal.getsignal(stop) for stop in stops] == usual
        monkeypatch.setattr(command_line, "parent_process", lambda: SimpleNamespace(pid=12345))
        for stream in ("stdout", "stderr"):
            monkeypatch.setattr(sys, stream, getattr(sys, stream))
        with command_line.cell("spectrim"):
            assert all(signal.getsignal(stop) is signal.SIG_IGN for stop in stops)
    finally:
        command_line._obey.cache_clear()
        for stop, handler in zip(stops, usual, strict=True):
            signal.signal(stop, handler)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs the processes of /proc")
def test_a_process_of_joblib_that_has_had_no_cell_ends_with_its_parent(digits: list[str], tmp_path: Path) -> None:
    process = started(["-m", *digits, "algorithm=truncation", "algorithm.ratio=0.2,0.4", *LAUNCHERS[1]], tmp_path)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and not (workers := children.read_text().split()):
        time.sleep(0.01)
    time.sleep(0.5)  # It imports.
    process.kill()
    assert workers and ended(process)[0] == -signal.SIGKILL  # once all that it started are gone


def test_a_worker_watches_its_parent_and_no_other_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    watched: list[int] = []
    monkeypatch.setattr(command_line, "_end_with", watched.append)
    command_line._watch_parent()
    monkeypatch.setattr(command_line, "parent_process", lambda: SimpleNamespace(pid=12345))
    command_line._watch_parent()
    assert watched == [12345]


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=["basic", "joblib"])
def test_a_reader_that_ends_and_a_closed_stream_cost_no_run(
    launcher: list[str], digits: list[str], tmp_path: Path
) -> None:
    environment = os.environ | {"PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}
    words = ["-m", *digits, "algorithm=truncation", "algorithm.ratio=0.2,0.4", *launcher]
    command = shlex.join([sys.executable, "-m", "spectrim.cli.run", *words])
    script = f'{command} 2>&- | true; echo "${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "0\n" and not done.stderr
    assert len(records.read_all(tmp_path, "runs")) == 2


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "memory is exhausted: use a smaller model"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            "memory is exhausted",
        ),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA"), "memory is exhausted: use a smaller model"),
        (OSError(36, "File name too long", "x" * 5000), "the name of a file is too long, give a shorter one: xxx"),
    ],
)
def test_what_the_machine_does_not_give_is_one_line(error: Exception, message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal, command_line.cell("spectrim"):
        raise error
    assert len(str(refusal.value)) < 200 and "\n" not in str(refusal.value)


def test_an_error_without_a_message_is_told_by_that_of_its_cause() -> None:
    error = ConfigCompositionException()
    error.__cause__ = ValueError("rank is\nno number")
    assert innermost(error) == "rank is no number"
    assert innermost(ConfigCompositionException()) == "ConfigCompositionException"
