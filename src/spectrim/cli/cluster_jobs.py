"""The jobs that a launcher started on a cluster: which ones ended without a result, and which go on after Ctrl-C."""

from collections.abc import Callable
from traceback import walk_tb
from typing import Any

from spectrim.errors import UserError, first_line

SUBMITIT = "hydra_plugins.hydra_submitit_launcher.submitit_launcher"


class Lost(UserError):
    """Jobs ended without a result: they were killed, or could not begin."""


def watched(job: Callable[[], Any]) -> None:
    """Call ``job``. Where a launcher finds a job without a result, wait for the others and raise ``Lost``."""
    try:
        job()
    except Exception as error:
        home = type(error).__module__
        if "Unknown plugin class : 'hydra_plugins.hydra_ray_launcher" in str(error):
            raise UserError("hydra/launcher=ray needs extra packages: pip install 'spectrim[ray]'") from error
        if home.startswith("ray."):
            raise Lost(f"Ray: {first_line(error)}; the same command goes on") from error
        jobs = _jobs(error)
        if not jobs or not home.startswith("submitit."):
            raise
        for one in jobs:
            one.wait()
        raise Lost(_lost(jobs, error)) from error


def _lost(jobs: list[Any], error: Exception) -> str:
    lost = [one for one in jobs if not one.paths.result_pickle.exists()]
    if not lost:  # The job ended with an error before it could run its cell, and told the traceback.
        told = [line for line in str(error).partition("You can check")[0].splitlines() if line.strip("- ")]
        return f"a job of the grid could not begin: {told[-1].strip()}; the output is in {jobs[0].paths.folder.parent}"
    count = "1 job" if len(lost) == 1 else f"{len(lost)} jobs"
    return (
        f"{count} of the grid ended without a result: {', '.join(one.job_id for one in lost)}; "
        f"the output is in {lost[0].paths.folder}; the same command goes on"
    )


def left_behind(error: BaseException) -> str:
    """Return which jobs go on after Ctrl-C, and how to cancel them; empty where none does."""
    left = [one for one in _jobs(error) if not one.done()]
    if not left:
        return ""
    count = "1 job goes" if len(left) == 1 else f"{len(left)} jobs go"
    if hasattr(left[0], "_process"):  # those of hydra/launcher=submitit_local
        processes = " ".join(str(one._process.pid) for one in left)
        return f"{count} on in processes of this machine; cancel them with: kill -INT {processes}"
    arrays = dict.fromkeys(one.job_id.partition("_")[0] for one in left)
    return f"{count} on in Slurm; cancel them with: scancel {' '.join(arrays)}"


def _jobs(error: BaseException) -> list[Any]:
    """Return the jobs that the launcher of submitit waited for when ``error`` was raised."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__) if frame.f_globals.get("__name__") == SUBMITIT]
    return next((list(frame.f_locals["jobs"]) for frame in frames if "jobs" in frame.f_locals), [])
