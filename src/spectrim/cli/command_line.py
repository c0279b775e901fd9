"""Run a grid on the command line: report each failed run in one line, and end workers with their parent."""

import errno
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import cache
from multiprocessing import parent_process
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import RLock, Thread
from traceback import format_exc, walk_tb
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from joblib.parallel import LokyBackend, register_parallel_backend
from omegaconf import DictConfig
from tqdm import tqdm

from spectrim.cli import cluster_jobs, messages, missing_cells, progress, run_lock, streams
from spectrim.cli.messages import LOG
from spectrim.cli.termination import ending, terminable, uncovered
from spectrim.errors import UserError
from spectrim.records.records import failure_path
from spectrim.runs import composition, read_once
from spectrim.runs.configuration import MISTAKES, check_choices, innermost, invocation, present_names
from spectrim.tools import files, malloc, spelling

composition.guard()  # here, because joblib's workers import this module before they compose a cell


@contextmanager
def cell(program: str) -> Iterator[None]:
    """Guard one run.

    In a grid the others go on after a failure; ``run`` names the failed ones at the end. It also waits for
    the runs that another process computes.
    """
    messages.configure()  # here too, because a process of a grid begins here
    if parent_process() is not None:
        _obey()
    malloc.give_back()  # memory fragments of the last run would add up
    malloc.keep()
    try:
        with uncovered():
            check_choices()
            yield
    except run_lock.Elsewhere as other:
        LOG.info("%s is computed %s; going on with the next run", other.result, other)
        progress.leave("elsewhere", str(other.result.absolute()))
    except Exception as raised:
        error = _of_the_machine(raised)
        if not progress.in_grid():
            raise error from raised.__cause__
        said = f"{_reason(error)} (in {invocation(program)})"
        progress.leave("failed", said)
        if not isinstance(error, MISTAKES):
            progress.leave("fault", format_exc())
        progress.finished(computed=True)
        raise UserError(said) from None


@contextmanager
def failure_noted(record: Path) -> Iterator[None]:
    """Leave the reason of a failed cell beside the place of its record, until the cell succeeds."""
    note = failure_path(record)
    try:
        with uncovered():
            yield
    except Exception as error:
        if progress.in_grid() or note.exists():
            with suppress(UserError):  # A disk that is full must not hide the error.
                files.write({note: (json.dumps({"reason": _reason(_of_the_machine(error))}, indent=1) + "\n").encode()})
        raise
    files.discard(note)


def _reason(error: Exception) -> str:
    """Return in one line why a run failed. A fault of the code is told with its type."""
    return innermost(error) if isinstance(error, MISTAKES) else f"{type(error).__name__}: {innermost(error)}"


def _of_the_machine(error: Exception) -> Exception:
    """Return ``error``, or in its place a ``UserError`` where memory is exhausted or a name is too long."""
    exhausted = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's own, for a GPU
    if exhausted or "DefaultCPUAllocator" in str(error):
        return UserError("memory is exhausted: use a smaller model or data.batch_size, or layers_at_once=1")
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return UserError(f"the name of a file is too long, give a shorter one: {str(error.filename)[:40]}...")
    return error


@cache
def _obey() -> None:
    """Make a joblib worker ignore Ctrl-C and SIGTERM, and go on where nobody reads what it prints."""
    sys.stdout, sys.stderr = streams.Outlet(sys.stdout), streams.Outlet(sys.stderr)
    for stop in (signal.SIGINT, signal.SIGTERM):  # The workers receive them too, from the terminal or from Slurm.
        signal.signal(stop, signal.SIG_IGN)
    tqdm.set_lock(RLock())  # tqdm's own lock is a system semaphore, which a killed worker leaks with a warning


def _end_with(parent: int) -> None:
    while os.getppid() == parent:  # a killed parent cannot end its workers, which would wait for ever
        time.sleep(1)
    os._exit(1)


def _watch_parent() -> None:
    """Start a thread that ends this worker with its parent."""
    parent = parent_process()
    if parent is not None and parent.pid is not None:  # not os.getppid(), which is another process after a kill
        Thread(target=_end_with, args=(parent.pid,), daemon=True).start()


class _Watched(LokyBackend):
    """Processes of joblib that watch their parent before they wait for their first cell."""

    def configure(self, *args: Any, **settings: Any) -> Any:
        return super().configure(*args, initializer=_watch_parent, **settings)


def run(job: Callable[[], Any], is_cell_done: Callable[[DictConfig], bool] = lambda _: False) -> None:
    """Run a Hydra entry.

    A user's mistake prints one line on stderr and exits with status 1; Ctrl-C exits with 130, SIGTERM with 143.

    ``is_cell_done``: tells from the configuration of a cell of a grid that it need not be run.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let errors reach us, to print them in one line
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report its use to its makers
    streams.open_closed()
    register_parallel_backend("loky", _Watched)  # the one that the launcher of Hydra takes
    # joblib ends a process whose memory has grown between two cells, and starts another. No cell is lost by it.
    warnings.filterwarnings("ignore", "A worker stopped while some jobs", UserWarning)
    stderr = _Stderr(sys.stderr)
    messages.take_options()
    _rename_arguments()
    with TemporaryDirectory(prefix="spectrim-") as folder:
        os.environ[composition.FOLDER] = folder
        try:
            with redirect_stdout(streams.Outlet(sys.stdout)), redirect_stderr(stderr), terminable():
                _check_options()
                with missing_cells.alone(is_cell_done):
                    _whole(job)
        except KeyboardInterrupt as stop:
            word, status = ending(stop)
            left = cluster_jobs.left_behind(stop) or "the same command goes on where it stopped"
            _end(f"{word}; {left}", status)
        except MISTAKES as error:
            _end(_failures(error), 1)
        except BrokenProcessPool as error:
            if error.__cause__:  # a worker could not read its task: a bug, not a mistake
                raise
            _end("a process of the grid was killed, perhaps for want of memory; the same command goes on", 1)
        except Exception as error:
            if _before_ours(error):  # Hydra has no error of its own for model=null or an unwritable folder
                _end(f"Hydra cannot begin with these settings: {innermost(error)}", 1)
            sys.stderr.write(stderr.withheld)
            raise
        finally:
            for variable in (composition.FOLDER, composition.SWEEP, messages.LEVEL):
                os.environ.pop(variable, None)


def _failures(error: Exception) -> str:
    """Return in one line what failed in a grid. Print one traceback in full where it was a fault of the code."""
    failed = progress.left("failed")
    for fault in progress.left("fault")[-1:]:
        sys.stderr.write(fault)
    lost = isinstance(error, cluster_jobs.Lost)
    told = [innermost(error)] if lost or len(failed) < 2 else []
    if len(failed) > 1:
        told.append(f"{len(failed)} runs failed: {'; '.join(failed)}")
    elif lost:
        told += failed
    return "; ".join(told)


def _check_options() -> None:
    """Refuse an unknown option in one line. Hydra would print its whole usage."""
    parser = get_args_parser()
    parser.error = _refuse_option  # type: ignore[method-assign]
    mistake = spelling.misspelt(sys.argv[1:], [*parser._option_string_actions, *messages.OPTIONS])
    if mistake:
        _refuse_option(mistake)
    parser.parse_args()


def _refuse_option(message: str) -> NoReturn:
    raise UserError(f"{message}; --help lists the options")


def _whole(job: Callable[[], Any]) -> None:
    """Run a grid, wait for the runs that other processes compute, and compute those that they left.

    Raises the error of a failed run, after the wait. A run that failed is computed again only where others were left.
    """
    while True:
        failure = None
        try:
            cluster_jobs.watched(job)
        except MISTAKES as error:
            failure = error
        elsewhere = [Path(result) for result in progress.left("elsewhere")]
        if elsewhere:
            LOG.info("waiting for %d runs that other processes compute", len(elsewhere))
        for result in elsewhere:
            run_lock.wait_for(result)
        if failure and all(result.exists() for result in elsewhere):
            raise failure
        if not elsewhere:
            return
        progress.begin_anew()


def _rename_arguments() -> None:
    """Replace the former name of a grid in ``sys.argv``, and say so."""
    for index, (given, present) in enumerate(zip(sys.argv, present_names(sys.argv), strict=True)):
        if given != present:
            LOG.warning("%s is named %s now", given, present)
            sys.argv[index] = present


def _before_ours(error: Exception) -> bool:
    """Whether Hydra raised the error before it called our code: an override, a launcher setting, its folder."""
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in walk_tb(error.__traceback__)]
    # Every composition passes through our module of that name, see ``composition.guard``, joblib through this one, and
    # a grid through that of its missing cells and that of the files that they share.
    passed = (composition.__name__, read_once.__name__, missing_cells.__name__, __name__)
    homes = [name.partition(".")[0] for name in modules if name not in passed]
    return "hydra" in homes and "spectrim" not in homes[homes.index("hydra") :]


def _end(line: str, status: int) -> NoReturn:
    LOG.error(line)
    sys.exit(status)


class _Stderr(streams.Outlet):
    """Drop the line that Hydra writes to stderr about a failed job: we print one line of our own."""

    withheld = ""

    def write(self, text: str) -> int:
        if not text.startswith("Error executing job with overrides:"):
            return super().write(text)
        self.withheld = text
        return len(text)
