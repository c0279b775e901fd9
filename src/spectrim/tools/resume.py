"""Results of long computations in a folder, by a digest of all they depend on, so that a killed process goes on."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from spectrim.errors import UserError
from spectrim.tools import files, safetensors_stream
from spectrim.tools.content import content, of_file
from spectrim.tools.precision import settings_of_numbers
from spectrim.tools.safetensors_stream import Shard

# A result that takes less time is cheaper to compute again than to keep.
WORTH_SECONDS = 0.05
FORMAT = "spectrim-result-1"


class Result(NamedTuple):
    """Tensors and texts by name."""

    tensors: dict[str, Tensor]
    texts: Mapping[str, str] = {}


class ResumeFolder:
    """A folder with a safetensors file for each result. Its files are never unpickled.

    A file that is damaged counts as absent. A result depends on nothing but what its digest covers, so a folder may
    serve several selections, and a stale file is never taken.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files.require_writable(folder / "result")
        if folder.is_dir():
            files.remove_litter(folder)

    def result(self, kind: str, inputs: Callable[[], Iterable[Any]], make: Callable[[], Result]) -> Result:
        """Return the result of ``kind`` for ``inputs`` from the folder, or call ``make`` and keep its result.

        ``inputs``: everything that the result depends on, tensors and settings; never called without a folder.
        """
        path = self.folder / f"{kind}-{content([kind, *inputs(), *settings_of_numbers()])}.safetensors"
        found = _read(path)
        if found is not None:
            return found
        began = time.perf_counter()
        made = make()
        if time.perf_counter() - began >= WORTH_SECONDS:
            _write(path, made)
        return made


def _write(path: Path, result: Result) -> None:
    digest = of_file(result.tensors, result.texts)
    try:
        safetensors_stream.save(path, result.tensors, {**result.texts, "format": FORMAT, "digest": digest})
    except UserError as error:
        raise UserError(f"{error}; or leave resume= out") from None


def _read(path: Path) -> Result | None:
    """Return the result in a file, or None where there is none or it is damaged."""
    if not path.is_file():
        return None
    try:
        shard = Shard.at(path)
        tensors, texts = {name: shard.read(name) for name in shard.entries}, dict(shard.metadata)
    except UserError:
        return None
    if texts.pop("format", None) != FORMAT:
        return None
    digest = texts.pop("digest", None)
    if digest != of_file(tensors, texts):
        return None
    return Result(tensors, texts)


_CURRENT: ContextVar[ResumeFolder | None] = ContextVar("resume", default=None)


@contextmanager
def into(folder: str | Path | None) -> Iterator[None]:
    """Keep the results that are computed inside the block in ``folder``, and take up those that it holds.

    None keeps nothing. Raises ``UserError`` where the folder has no name or cannot be written.
    """
    if folder == "":
        raise UserError("resume= is an empty name; give a folder, or leave it out")
    if not isinstance(folder, str | PathLike | None):
        raise UserError(f"resume={folder!r} is no folder; give its name, or leave it out")
    token = _CURRENT.set(None if folder is None else ResumeFolder(Path(folder)))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current() -> ResumeFolder | None:
    """Return the folder of the block that runs in this thread, or in the one from which it inherits (``threads``)."""
    return _CURRENT.get()


def tensors(
    kind: str,
    inputs: Callable[[], Iterable[Any]],
    make: Callable[[], Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """Return the tensors that ``make`` computes from ``inputs``, or those that ``current`` keeps of an earlier call.

    Without a folder it only calls ``make``.
    """
    folder = current()
    if folder is None:
        return dict(make())
    return folder.result(kind, inputs, lambda: Result(dict(make()))).tensors
