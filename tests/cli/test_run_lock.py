"""A run is computed by one process at a time, and it can be told by which."""

import json
import os
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Event, Thread

import pytest

from spectrim.cli import run_lock
from spectrim.errors import UserError


def second(result: Path) -> AbstractContextManager[None]:
    return run_lock.locked(result, wait=False)


def test_a_locked_run_is_refused_to_others_and_told_until_it_ends(tmp_path: Path) -> None:
    result = tmp_path / "table2" / "abc.json"
    assert run_lock.running(result) is None
    with run_lock.locked(result, wait=False):
        where = run_lock.running(result)
        assert where is not None and where.startswith(f"by process {os.getpid()} on ")
        with pytest.raises(run_lock.Elsewhere, match=f"^by process {os.getpid()} on .* since "), second(result):
            raise AssertionError
        assert run_lock.running(result) == where
    assert run_lock.running(result) is None and not list(result.parent.iterdir())
    with second(result):
        pass


def test_a_lock_ends_with_an_error_of_the_run(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), run_lock.locked(tmp_path / "abc.json", wait=False):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_who_waits_goes_on_when_the_other_has_ended(tmp_path: Path) -> None:
    result, begun, order = tmp_path / "abc.json", Event(), list[str]()

    def other() -> None:
        begun.set()
        with run_lock.locked(result, wait=True):
            order.append("second")

    with run_lock.locked(result, wait=False):
        thread = Thread(target=other)
        thread.start()
        begun.wait()
        thread.join(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_what_a_killed_process_left_counts_for_nothing(tmp_path: Path) -> None:
    (tmp_path / ".abc.running").write_text(json.dumps({"machine": "a", "process": 1, "since": "then"}))
    (tmp_path / ".abc.lock").touch()
    assert run_lock.running(tmp_path / "abc.json") is None
    run_lock.wait_for(tmp_path / "abc.json")
    assert [path.name for path in tmp_path.iterdir()] == [".abc.running"]
    with run_lock.locked(tmp_path / "abc.json", wait=False):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "wall").touch()
    with (
        pytest.raises(UserError, match="^cannot write .*abc.json: "),
        run_lock.locked(tmp_path / "wall" / "abc.json", wait=False),
    ):
        raise AssertionError
