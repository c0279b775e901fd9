"""From a composed configuration to objects: where it lies, what it may name, and its errors in one line."""

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr, suppress
from functools import cache
from multiprocessing import parent_process
from pathlib import Path
from pkgutil import resolve_name
from tempfile import TemporaryDirectory
from threading import RLock, Thread
from traceback import format_exc, walk_tb
from typing import Any, NoReturn, TextIO

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from spectrim.errors import UserError
from spectrim.tools import malloc, torchvision_shim

PACKAGES = ("spectrim.", "torch.", "torchvision.")
# Where the parts of a run come from. Elsewhere in the three packages there is code that runs commands, loads libraries
# and writes files.
PLACES = (
    "spectrim.algorithms.",
    "spectrim.data.",
    "spectrim.decomposers.",
    "spectrim.models.",
    "spectrim.runs.tracking.",
    "spectrim.training.fit.",
    "torch.nn.",
    "torchvision.models.",
)
UNPICKLING = ("torch.load", "torch.hub", "torch.serialization", "torch.package", "torch.jit")
MISTAKES = (UserError, HydraException, OmegaConfBaseException)
# Names the folder in which a run of a grid that fails leaves its line, from whichever process it runs in.
FAILURES = "SPECTRIM_FAILURES"
_CHECKOUT = Path(__file__).resolve().parents[3] / "conf"
CONF = str(_CHECKOUT if _CHECKOUT.is_dir() else Path(__file__).resolve().parents[1] / "conf")


def check_targets(node: Any, where: str = "config") -> None:
    """Refuse, before anything is imported, every ``_target_`` outside ``PLACES``."""
    if isinstance(node, DictConfig | dict):
        for key, value in node.items():
            reason = _refusal(str(value)) if key == "_target_" else ""
            if reason:
                raise UserError(f"{where}._target_={value} is refused: {reason}")
            check_targets(value, f"{where}.{key!s}")
    elif isinstance(node, ListConfig | list):
        for index, value in enumerate(node):
            check_targets(value, f"{where}[{index}]")


def _refusal(target: str) -> str:
    """Why ``target`` may not be made, judged by its name alone; empty where it may."""
    if not target.startswith(PACKAGES):
        return "only spectrim, torch and torchvision may be used"
    if target.startswith(UNPICKLING):
        return "it may run code from a file, nothing is unpickled"
    if not target.startswith(PLACES) or any(part.startswith("_") for part in target.split(".")):
        return f"it is no part of a run; those come from {', '.join(place[:-1] for place in PLACES)}"
    return ""


def _check_homes(node: Any) -> None:
    """Refuse what an allowed module merely imported, such as its ``os.system``, and name what does not exist."""
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _check_homes(value)
    if not isinstance(node, dict) or "_target_" not in node:
        return
    target = node["_target_"]
    try:
        home = getattr(resolve_name(target), "__module__", None) or target  # functions written in C may have none
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"_target_={target} cannot be found: {error}") from error
    if not f"{home}.".startswith(PLACES):
        raise UserError(f"_target_={target} is refused: it belongs to {home}, where no part of a run comes from")


def plain(node: DictConfig) -> dict[str, Any]:
    """A node with its interpolations resolved, as plain dicts, lists, numbers and strings."""
    return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def check_seed(cfg: DictConfig) -> None:
    """Refuse a seed that torch would silently read as another one (true, 1.5) or that its generators do not take."""
    if type(cfg.seed) is not int or not 0 <= cfg.seed < 2**32:
        raise UserError(f"seed={cfg.seed!r} is not a whole number in 0..{2**32 - 1}")


def text(cfg: DictConfig, key: str) -> str:
    """A name or a path of the configuration. Raises ``UserError`` where it is null or anything but text."""
    if not isinstance(cfg[key], str):
        raise UserError(f"{key}={cfg[key]!r} is not text; give a name or a path")
    return cfg[key]


def build(settings: dict[str, Any], can: str = "") -> Any:
    """The object that ``settings`` (with its ``_target_``) describes, which has the method ``can``.

    Raises ``UserError`` in one line.
    """
    check_targets(settings)
    if "torchvision." in str(settings):
        torchvision_shim.prepare()
        # Its own functions, when they fetch weights, do not ask torch.load for tensors alone.
        os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    _check_homes(settings)
    try:
        made = instantiate(settings, _convert_="all")
    except HydraException as error:
        raise UserError(_innermost(error)) from error
    if can and not callable(getattr(made, can, None)):
        raise UserError(f"_target_={settings.get('_target_')} gives a {type(made).__name__}, which has no method {can}")
    return made


def invocation(program: str) -> str:
    """The command that makes this one run, also where it is one of a grid, as it is pasted into a shell."""
    return shlex.join([program, *HydraConfig.get().overrides.task]) if HydraConfig.initialized() else program


@contextmanager
def cell(program: str) -> Iterator[None]:
    """Around one run. Of a grid it lets the others go on: ``command_line`` names at the end each one that failed."""
    if parent_process() is not None:
        _obey(os.getppid())
    malloc.give_back()  # of the run before: its pieces, which little of the next fits into, would add up run by run
    malloc.keep()
    try:
        yield
    except Exception as error:
        if not HydraConfig.initialized() or HydraConfig.get().mode is not RunMode.MULTIRUN:
            raise
        fault = not isinstance(error, MISTAKES)
        said = f"{type(error).__name__ + ': ' if fault else ''}{_innermost(error)} (in {invocation(program)})"
        with suppress(KeyError, OSError):  # without a command line around it, or once that was killed
            folder = Path(os.environ[FAILURES])
            (folder / f"run{HydraConfig.get().job.num:09d}").write_text(said)
            if fault:
                (folder / "fault").write_text(format_exc())
        raise UserError(said) from None


@cache
def _obey(parent: int) -> None:
    """Once in each process of joblib: let it end by its parent's hand, in silence, and not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too
    tqdm.set_lock(RLock())  # its own is a semaphore of the system, which would be left there, with a warning
    Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:  # a parent that is killed cannot end its processes, and joblib's would wait for ever
        time.sleep(1)
    os._exit(1)


def command_line(job: Callable[[], Any]) -> None:
    """Run a Hydra entry; a person's mistake ends in one line on stderr and exit status 1, Ctrl-C in 130."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to us, to be said in one line
    stderr = _Stderr(sys.stderr)
    with TemporaryDirectory(prefix="spectrim-") as folder:
        os.environ[FAILURES] = folder
        try:
            with redirect_stderr(stderr):
                job()
        except KeyboardInterrupt:
            _end("interrupted; the same command goes on where it stopped", 130)
        except MISTAKES as error:
            failed = [path.read_text() for path in sorted(Path(folder).glob("run*"))]
            for fault in Path(folder).glob("fault"):  # of ours: one of them in full
                sys.stderr.write(fault.read_text())
            _end(f"{len(failed)} runs failed: {'; '.join(failed)}" if len(failed) > 1 else _innermost(error), 1)
        except BrokenProcessPool as error:
            if error.__cause__:  # a process could not read its task: no person's mistake
                raise
            _end("a process of the grid was killed, perhaps for want of memory; the same command goes on", 1)
        except Exception as error:
            if _before_ours(error):  # for model=null or a folder that cannot be written it has no error of its own
                _end(f"Hydra cannot begin with these settings: {_innermost(error)}", 1)
            sys.stderr.write(stderr.withheld)
            raise
        finally:
            del os.environ[FAILURES]


def _before_ours(error: Exception) -> bool:
    """Whether Hydra raised it before it called any code of ours: an override, a launcher's setting, its folder."""
    homes = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame, _ in walk_tb(error.__traceback__)]
    return "hydra" in homes and "spectrim" not in homes[homes.index("hydra") :]


def _end(line: str, status: int) -> NoReturn:
    print(f"spectrim: {line}", file=sys.stderr)
    sys.exit(status)


class _Stderr:
    """stderr, but for the line that Hydra writes about a failed job: a person's mistake is said in one line, ours."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.withheld = stream, ""

    def write(self, text: str) -> int:
        if not text.startswith("Error executing job with overrides:"):
            return self.stream.write(text)
        self.withheld = text
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _innermost(error: BaseException) -> str:
    """The message of the first ``UserError`` in the chain, else what Hydra says, in one line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return str(cause)
        cause = cause.__cause__
    return " ".join(str(error).partition("Config search path:")[0].split()) or type(error).__name__
