"""Files are written whole or not at all, and nothing lasting is left of a writer that failed or was killed."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from spectrim.errors import UserError
from spectrim.tools import files

HALF_WRITTEN = """
import sys, time
from pathlib import Path
from spectrim.tools import files
with files.scratch(Path(sys.argv[1]).parent), files.replacing(Path(sys.argv[1])) as (made,):
    made.write_bytes(b"half")
    print("written", flush=True)
    time.sleep(60)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def is_locked(folder: Path) -> bool:
    with (folder / files.LOCK).open("r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(100):
        if holds():
            return
        time.sleep(0.05)
    pytest.fail("it does not come true")


def half_written(path: Path, *before: str) -> subprocess.Popen:
    """A process that has written half of a file, in a scratch folder beside it. ``before``: a command to start it."""
    process = subprocess.Popen([*before, sys.executable, "-c", HALF_WRITTEN, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"written\n"
    return process


def test_contents_are_as_given_and_nothing_else_is_there(tmp_path: Path) -> None:
    contents = {tmp_path / "deep" / "a.csv": b"1", tmp_path / "deep" / "b.csv": b"", tmp_path / "c.csv": b"3"}
    for _ in range(2):  # the second time in place of the first
        files.write(contents)
        assert {path: path.read_bytes() for path in contents} == contents
        assert names(tmp_path) == ["c.csv", "deep"] and names(tmp_path / "deep") == ["a.csv", "b.csv"]


def test_a_file_is_as_readable_for_others_as_any_new_file_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    files.write({tmp_path / "written": b""})
    assert (tmp_path / "written").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_refuses_leaves_the_old_files_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, step: str
) -> None:
    files.write({tmp_path / "a": b"old"})

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, step, refuse)
    with pytest.raises(UserError, match=rf"^cannot write [^\n]*: {os.strerror(code)}; free some space or [^\n]*$"):
        files.write({tmp_path / "a": b"new", tmp_path / "b": b"new"})
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"old"


def test_several_files_are_written_all_or_none(tmp_path: Path) -> None:
    (tmp_path / "wall").write_text("a file, not a folder")
    with pytest.raises(UserError, match="cannot write .*: Not a directory .*wall"):
        files.write({tmp_path / "a.csv": b"1", tmp_path / "wall" / "b.csv": b"2"})
    assert names(tmp_path) == ["wall"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError, SystemExit])
def test_whatever_ends_a_writer_leaves_nothing(tmp_path: Path, kind: type[BaseException]) -> None:
    with pytest.raises(kind), files.scratch(tmp_path), files.replacing(tmp_path / "a") as (made,):
        made.write_bytes(b"half")
        raise kind
    assert names(tmp_path) == []


def test_files_and_folder_are_synced_before_and_after_the_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        done.append("folder" if os.path.samestat(os.fstat(descriptor), tmp_path.stat()) else "file")
        sync(descriptor)

    def moved(*paths: Path) -> None:
        done.append("move")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", moved)
    files.write({tmp_path / "a": b"1", tmp_path / "b": b"2"})
    assert done == ["file", "file", "move", "move", "folder"]


def test_a_folder_comes_whole(tmp_path: Path) -> None:
    with files.replacing(tmp_path / "set") as (made,):
        (made / "deep").mkdir(parents=True)
        (made / "deep" / "x").write_bytes(b"1")
        assert not (tmp_path / "set").exists()
    assert (tmp_path / "set" / "deep" / "x").read_bytes() == b"1" and names(tmp_path) == ["set"]


def test_a_folder_that_another_run_has_written_meanwhile_stays_and_the_advice_fits(tmp_path: Path) -> None:
    theirs = tmp_path / "out"
    with pytest.raises(OSError) as raised, files.replacing(theirs) as (made,):
        made.mkdir()
        theirs.mkdir()
        (theirs / "model").write_text("theirs")
    assert (theirs / "model").read_text() == "theirs" and [*tmp_path.iterdir()] == [theirs]
    said = str(files.refusal(theirs, raised.value))
    assert said.endswith("another run may have written it; choose another name") and "space" not in said


def test_a_folder_or_a_pipe_is_never_replaced_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        for attempt in (files.require_writable, lambda path: files.write({path: b""})):
            with pytest.raises(UserError, match=f"cannot write .*{name}: a folder or a device has this name"):
                attempt(tmp_path / name)
    assert names(tmp_path) == ["folder", "pipe"]


def test_writers_of_one_path_at_once_do_not_mix(tmp_path: Path) -> None:
    contents = [bytes([letter]) * 100_000 for letter in b"abcdefgh"]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: files.write({tmp_path / "x": content}), contents))
    assert (tmp_path / "x").read_bytes() in contents and names(tmp_path) == ["x"]


APART = ("unshare", "--map-root-user", "--pid", "--fork", "--kill-child")  # as a container: it has its own numbers


@pytest.mark.parametrize("before", [(), APART], ids=["here", "in another container"])
def test_what_a_killed_process_left_goes_with_the_next_writer_and_what_a_living_one_writes_stays(
    tmp_path: Path, before: tuple[str, ...]
) -> None:
    if before and subprocess.run([*before, "true"], capture_output=True).returncode:
        pytest.skip("this machine makes no namespaces")
    with half_written(tmp_path / "a", *before) as killed:
        left = names(tmp_path)
        assert len(left) == 2 and all(name.startswith(".") for name in left)
        files.write({tmp_path / "other": b""})
        assert names(tmp_path) == [*left, "other"]
        killed.send_signal(signal.SIGKILL)
    elsewhere = tmp_path / left[0].replace(files._machine(), "another-machine")  # that shares the folder
    shutil.copytree(tmp_path / left[0], elsewhere)
    (tmp_path / left[1]).with_name(f".early.{files._machine()}.{'0' * 16}.tmp").mkdir()  # killed before it was locked
    wait_until(lambda: not is_locked(tmp_path / left[0]))
    files.write({tmp_path / "other": b""})
    assert names(tmp_path) == [elsewhere.name, "other"]


def test_a_folder_that_was_taken_for_litter_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, taken = fcntl.flock, list[Path]()

    def locked_late(descriptor: int, operation: int) -> None:
        if len(taken) < 3:
            taken.append(next(tmp_path.glob(".*.tmp")))
            shutil.rmtree(taken[-1])
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", locked_late)
    files.write({tmp_path / "a": b"1"})
    assert len(set(taken)) == 3 and names(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"1"


def test_where_there_are_no_locks_files_are_written_and_nothing_of_others_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with files.replacing(tmp_path / "a") as (made,):
        made.write_bytes(b"1")
        files.write({tmp_path / "b": b"2"})
    assert names(tmp_path) == ["a", "b"]


def test_no_link_leads_to_the_removal_of_another_folder(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    (theirs / files.MADE).mkdir(parents=True)
    (theirs / files.LOCK).touch()
    link = tmp_path / "here" / f".a.{files._machine()}.{'0' * 16}.tmp"
    link.parent.mkdir()
    link.symlink_to(theirs)
    files.write({tmp_path / "here" / "b": b""})
    assert names(theirs) == [files.LOCK, files.MADE]


def test_a_long_name_is_written_and_one_that_is_too_long_is_refused(tmp_path: Path) -> None:
    files.write({tmp_path / ("ü" * 120): b"1"})
    for attempt in (files.require_writable, lambda path: files.write({path: b""})):
        with pytest.raises(UserError, match="File name too long"):
            attempt(tmp_path / ("n" * 5000))


def test_trying_an_output_leaves_everything_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    files.require_writable(tmp_path / "old", tmp_path / "new", tmp_path / "not" / "yet" / "there", nbytes=1000)
    assert names(tmp_path) == ["old"] and (tmp_path / "old").read_bytes() == b"old"


def test_an_output_that_cannot_be_written_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wall").write_text("a file, not a folder")

    def refused(message: str, *parts: str, nbytes: int = 0) -> None:
        with pytest.raises(UserError, match=f"^cannot write [^\n]*: {message}[^\n]*; free some space [^\n]*$"):
            files.require_writable(tmp_path / "fine", tmp_path.joinpath(*parts), nbytes=nbytes)

    refused("Not a directory", "wall", "x")
    refused("Not a directory", "wall", "deep", "x")
    refused("1,000,000,000,000 MiB do not fit on the disk", "x", nbytes=10**12 * 2**20)
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):

        def refuse(*_: object, code: int = code) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", refuse)
        refused(os.strerror(code), "deep", "x")
    assert names(tmp_path) == ["wall"]
