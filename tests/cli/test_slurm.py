"""A grid on a Slurm of one node that the tests start: a job is killed, and the numbers stay those of one process."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from spectrim.runs import configuration

SOURCE = str(Path(configuration.__file__).parents[2])
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
# Of the grid whose job is killed. The large one has 40 cells: SPECTRIM_LONG_TESTS=1.
RATIOS, SEEDS = (10, 4) if os.environ.get("SPECTRIM_LONG_TESTS") else (2, 2)
SEARCHED = os.environ["PATH"] + ":/usr/sbin:/sbin"
pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or any(shutil.which(name, path=SEARCHED) is None for name in NEEDED),
    reason="needs root and Slurm (apt install slurm-wlm munge)",
)
# One node that is this machine. Its records of jobs stay in memory, for there is no accounting database.
CONFIGURATION = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=15
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=defer,sched_interval=1,batch_sched_delay=1
ReturnToService=2
MinJobAge=3600
MailProg=/bin/true
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# sacct needs an accounting database; scontrol knows the same states for an hour.
SACCT = r"""#!/bin/sh
echo 'JobID|State|NodeList'
scontrol show jobs --oneliner | sed -n \
  's/^JobId=\([0-9]*\) ArrayJobId=\([0-9]*\) ArrayTaskId=\([0-9]*\) .*JobState=\([A-Z_]*\) .*/\2_\3|\4|node/p'
"""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def daemon(*command: str, **more: Any) -> Iterator[None]:
    """A program that runs in the foreground while the block runs."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **more)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory, until: Any) -> Iterator[dict[str, str]]:
    """The environment of a person on the cluster."""
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool", "bin"):
        (folder / name).mkdir()
    host = socket.gethostname().partition(".")[0]
    ports = {"controller": free_port(), "node": free_port()}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(host=host, folder=folder, cores=os.cpu_count(), **ports))
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    (folder / "bin" / "sacct").write_text(SACCT)
    (folder / "bin" / "sacct").chmod(0o755)
    own = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    own |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{folder / 'bin'}:{SEARCHED}"}
    own |= {"PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}
    files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "log-file": "munge.log"}
    munge = [f"--{option}={folder / name}" for option, name in (files | {"seed-file": "munge.seed"}).items()]
    with daemon("munged", "--foreground", "--force", *munge, env=own):
        until((folder / "munge.socket").exists, 20)
        with daemon("slurmctld", "-D", env=own), daemon("slurmd", "-D", "-N", host, env=own):
            until(lambda: "idle" in said("sinfo", "-h", "-o", "%T", env=own), 60)
            yield own
            subprocess.run(["scancel", "--user=root"], env=own, check=False)
            until(lambda: not said("squeue", "-h", env=own), 60)


def said(*command: str, env: dict[str, str]) -> str:
    return subprocess.run(command, env=env, capture_output=True, text=True).stdout


ON_SLURM = ("hydra/launcher=slurm_cpu", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=1")


def test_a_grid_goes_on_after_a_job_was_killed_and_gives_the_same_numbers(
    slurm: Any, small_grid: Any, until: Any, tmp_path: Path
) -> None:
    alone, spread = small_grid(tmp_path / "alone", RATIOS, SEEDS), small_grid(tmp_path / "spread", RATIOS, SEEDS)
    there = {"env": slurm, "cwd": tmp_path}
    assert alone.run(**there).returncode == 0
    first = spread.start(*ON_SLURM, **there)
    until(spread.kill_one, 300)
    _, err = first.communicate(timeout=1200)
    assert first.returncode == 1
    told = r"^spectrim: 1 job of the grid ended without a result: \d+_\d+; the output is in \S+/build/slurm/\S+; the"
    assert re.search(told, err, re.MULTILINE), err
    assert len(spread.numbers()) == spread.size - 1
    queued = len(list(tmp_path.rglob("*_submitted.pkl")))
    again = spread.run(*ON_SLURM, **there)
    assert again.returncode == 0, again.stderr
    assert len(list(tmp_path.rglob("*_submitted.pkl"))) == queued + 1  # recorded cells become no jobs
    assert spread.numbers() == alone.numbers() and len(alone.numbers()) == alone.size


def test_ctrl_c_tells_which_jobs_go_on_and_how_to_cancel_them(
    slurm: Any, small_grid: Any, until: Any, tmp_path: Path
) -> None:
    grid = small_grid(tmp_path / "records", 4, 2)
    started = grid.start(*ON_SLURM, env=slurm, cwd=tmp_path)
    until(grid.running, 300)
    assert "runs" in said("squeue", "-h", "-o", "%j", env=slurm).split()  # the name of a job
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=60)
    assert started.returncode == 130
    (cancel,) = re.findall(
        r"^spectrim: interrupted; \d jobs? go(?:es)? on in Slurm; cancel them with: (.*)$", err, re.M
    )
    subprocess.run(cancel.split(), env=slurm, check=True)
    until(lambda: not said("squeue", "-h", env=slurm), 60)
    assert len(grid.numbers()) < grid.size


def test_a_training_that_is_warned_of_its_time_limit_goes_on_from_its_state(
    slurm: Any, until: Any, tmp_path: Path
) -> None:
    long = ["algorithm=svd_training_plain", "algorithm.recipe.epochs=150", "algorithm.seed=0,1"]
    words = ["-m", "data=digits", "model=mlp", "checkpoint=null", *long, "records=records", *ON_SLURM]
    command = [sys.executable, "-m", "spectrim.cli.run", *words]
    started = subprocess.Popen(command, env=slurm, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    until(lambda: list(tmp_path.glob("build/training/*.state.safetensors")), 300)
    (job, *_) = said("squeue", "-h", "-t", "R", "-o", "%A", env=slurm).split()
    subprocess.run(["scancel", "--signal=USR2", job], env=slurm, check=True)  # what Slurm sends before the limit
    _, err = started.communicate(timeout=600)
    assert started.returncode == 0, err
    logs = [path.read_text() for path in tmp_path.glob("build/slurm/*/*_log.out")]
    assert sum("Requeued job" in log or "requeue" in log.lower() for log in logs) == 1
    assert [len(re.findall(r"^epoch \d+/150", log, re.MULTILINE)) for log in logs] == [150, 150]
