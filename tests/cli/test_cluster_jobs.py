"""Jobs on a cluster: which ended without a result, which go on after Ctrl-C, and which extra starts them."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

from spectrim.cli import cluster_jobs, command_line, commands, progress
from spectrim.cli.cluster_jobs import Lost, left_behind, watched
from spectrim.runs import configuration

SOURCE = str(Path(configuration.__file__).parents[2])


def job(folder: Path, number: str, done: bool = True, result: bool = True) -> Any:
    """What submitit returns for a job of an array."""
    path = folder / f"{number}_result.pkl"
    if result:
        path.touch()
    paths = SimpleNamespace(result_pickle=path, folder=folder)
    return SimpleNamespace(job_id=number, done=lambda: done, wait=lambda: None, paths=paths)


def launcher(jobs: list[Any], error: BaseException) -> Any:
    """A function that waits for ``jobs`` in a frame of the launcher, and raises ``error`` there."""
    inside: dict[str, Any] = {"__name__": cluster_jobs.SUBMITIT, "error": error}
    exec("def launch(jobs):\n    raise error", inside)
    return lambda: inside["launch"](jobs)


def raised(call: Any) -> BaseException:
    with pytest.raises(BaseException) as caught:
        call()
    return caught.value


def test_a_job_without_a_result_is_named_after_all_have_ended(tmp_path: Path) -> None:
    class Uncompleted(RuntimeError):
        __module__ = "submitit.core.utils"

    jobs = [job(tmp_path, "7_0"), job(tmp_path, "7_1", result=False), job(tmp_path, "7_2")]
    waited: list[str] = []
    for one in jobs:
        one.wait = lambda own=one: waited.append(own.job_id)
    with pytest.raises(Lost, match="^1 job of the grid ended without a result: 7_1; the output is in ") as told:
        watched(launcher(jobs, Uncompleted("killed")))
    assert waited == ["7_0", "7_1", "7_2"] and str(told.value).endswith("; the same command goes on")


def test_a_job_that_could_not_begin_is_told_with_the_last_line_of_its_traceback(tmp_path: Path) -> None:
    class Failed(RuntimeError):
        __module__ = "submitit.core.utils"

    line = "-" * 22
    trace = f"Job (task=0) failed during processing with trace:\n{line}\nTraceback\nImportError: no torch\n{line}\n"
    with pytest.raises(Lost, match=r"^a job of the grid could not begin: ImportError: no torch; the output is in "):
        watched(launcher([job(tmp_path, "7_0")], Failed(f"{trace}You can check full logs with 'job.stderr(0)'")))


@pytest.mark.parametrize(
    ("failed", "told"),
    [([], ""), (["ratio is 2 (in spectrim a)"], "; ratio is 2 (in spectrim a)"), (["x", "y"], "; 2 runs failed: x; y")],
)
def test_a_lost_job_is_told_beside_the_cells_that_failed(
    failed: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose() -> None:
        raise Lost("1 job was lost")

    monkeypatch.setattr(progress, "left", lambda kind: failed if kind == "failed" else [])
    monkeypatch.setattr(sys, "argv", ["spectrim"])
    with pytest.raises(SystemExit):
        command_line.run(lose)
    assert capsys.readouterr().err == f"spectrim: 1 job was lost{told}\n"


def test_another_error_goes_on_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        watched(launcher([job(tmp_path, "7_0")], ZeroDivisionError()))


def test_ctrl_c_names_the_jobs_that_go_on(tmp_path: Path) -> None:
    jobs = [job(tmp_path, "7_0"), job(tmp_path, "7_1", done=False), job(tmp_path, "7_2", done=False)]
    stop = raised(launcher(jobs, KeyboardInterrupt()))
    assert left_behind(stop) == "2 jobs go on in Slurm; cancel them with: scancel 7"
    jobs[1]._process = jobs[2]._process = SimpleNamespace(pid=99)
    assert left_behind(stop) == "2 jobs go on in processes of this machine; cancel them with: kill -INT 99 99"
    assert left_behind(raised(launcher(jobs[:1], KeyboardInterrupt()))) == ""
    assert left_behind(KeyboardInterrupt()) == ""


@pytest.mark.skipif("hydra_plugins.hydra_ray_launcher" in sys.modules, reason="Ray is installed")
def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["spectrim", "-m", "hydra/launcher=ray", "seed=0,1"])
    with pytest.raises(SystemExit):
        commands.compress()
    assert capsys.readouterr().err.endswith("needs extra packages: pip install 'spectrim[ray]'\n")


def test_without_submitit_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Plugins.instance()  # The first call stores the options of the plugins.
    options = ConfigStore.instance().repo["hydra"]["launcher"]
    for name in [name for name in options if "submitit" in name]:
        monkeypatch.delitem(options, name)
    monkeypatch.setattr(sys, "argv", ["spectrim", "-m", "hydra/launcher=slurm_cpu", "seed=0,1"])
    with pytest.raises(SystemExit):
        commands.compress()
    assert capsys.readouterr().err.endswith("needs extra packages: pip install 'spectrim[cluster]'\n")


def test_jobs_of_this_machine_outlive_ctrl_c_and_end_as_the_line_says(until: Any, tmp_path: Path) -> None:
    long = ["algorithm=svd_training_plain", "algorithm.recipe.epochs=100000", "algorithm.seed=0,1"]
    words = ["-m", "data=digits", "model=mlp", "checkpoint=null", *long, "records=r", "hydra/launcher=submitit_local"]
    command = [sys.executable, "-m", "spectrim.cli.run", *words]
    environment = os.environ | {"PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "told").open("w") as stderr:  # a file: the jobs hold it open for longer than the command
        started = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=stderr)
    try:
        until(lambda: len(list(tmp_path.glob("r/runs/.*.running"))) == 2, 240)
        started.send_signal(signal.SIGINT)
        assert started.wait(240) == 130
        err = (tmp_path / "told").read_text()
        told = r"; 2 jobs go on in processes of this machine; cancel them with: (kill -INT (\d+) (\d+))$"
        assert re.search("^spectrim: interrupted", err, re.MULTILINE)
        kill, *processes = re.findall(told, err, re.MULTILINE)[0]
        assert all(alive(int(process)) for process in processes)
        subprocess.run(kill.split(), check=True)
        until(lambda: not any(alive(int(process)) for process in processes), 60)
    finally:
        started.kill()
        started.wait()  # else a later test is told of it
        for note in tmp_path.glob("r/runs/.*.running"):  # of jobs that a failure of this test has left
            with suppress(ProcessLookupError):
                os.kill(json.loads(note.read_text())["process"], signal.SIGKILL)


def alive(process: int) -> bool:
    """Whether a process runs. One that has ended may wait for its parent to take notice."""
    status = Path(f"/proc/{process}/status")
    return status.exists() and "State:\tZ" not in status.read_text()
