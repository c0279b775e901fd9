"""How far a grid is while it runs: each cell leaves a file in a folder that all processes of the grid see."""

import json
import os
import time
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from spectrim.runs.composition import FOLDER, SWEEP
from spectrim.tools.profiling import duration


def in_grid() -> bool:
    """Return whether this process runs a cell of a grid."""
    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


def leave(kind: str, text: str) -> None:
    """Leave a file on the cell that runs.

    Without a command line around it, or on another machine, it leaves none.

    ``kind``: such as ``failed``; ``left`` lists the files of one kind.
    """
    try:
        (Path(os.environ[FOLDER]) / f"{kind}{HydraConfig.get().job.num:09d}").write_text(text)
    except (KeyError, OSError):
        return


def left(kind: str) -> list[str]:
    """Return the texts of all files of one kind, in the order of the cells."""
    return [path.read_text() for path in sorted(Path(os.environ[FOLDER]).glob(f"{kind}[0-9]*"))]


def begin_anew() -> None:
    """Forget what the cells left, before the same grid goes through them once more."""
    for path in Path(os.environ[FOLDER]).iterdir():
        path.unlink()
    os.environ.pop(SWEEP, None)


def begin(done: int) -> None:
    """Note how many cells were done before the first one begins, and that it begins now."""
    if SWEEP in os.environ:
        os.environ[SWEEP] = json.dumps({**json.loads(os.environ[SWEEP]), "done": done, "began": time.time()})


def finished(computed: bool) -> None:
    """Count a cell of the grid as finished.

    ``computed``: whether it took time; a recorded cell takes none.
    """
    if in_grid():
        leave("finished", "computed" if computed else "")


def said() -> str:
    """Return how far the grid is, such as ``[3 of 12, 4 min left]`` and a space; empty outside of a grid."""
    sweep = _sweep()
    if not sweep or FOLDER not in os.environ:
        return ""
    ended = left("finished")
    done = sweep.get("done", 0) + len(ended)
    computed, missing = sum(map(bool, ended)), sweep["cells"] - done
    if not computed or missing <= 0:
        return f"[{done} of {sweep['cells']}] "
    spent = time.time() - sweep["began"]
    return f"[{done} of {sweep['cells']}, {duration(spent / computed * missing)} left] "


def varied() -> str:
    """Return the swept settings of the cell that runs, such as ``algorithm.ratio=0.4 seed=1``."""
    keys = _sweep().get("keys", ())
    words = HydraConfig.get().overrides.task if keys else ()
    return " ".join(word for word in words if word.lstrip("+").partition("=")[0] in keys)


def _sweep() -> dict[str, Any]:
    return json.loads(os.environ.get(SWEEP, "{}")) if in_grid() else {}
