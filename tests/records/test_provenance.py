"""Provenance names the code, the files and the machine, and says "unknown" where it cannot know."""

import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from spectrim.records import provenance as module
from spectrim.records.provenance import UNKNOWN, git_state, machine, provenance, versions


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_provenance_is_complete_and_json() -> None:
    assert provenance("x", "abc", "def")["checkpoint_digest"] == "def"
    found = provenance("spectrim model=mlp", "abc", None)
    digests = {"data_digest", "checkpoint_digest", "lock_digest"}
    assert set(found) == digests | {"command", "commit", "dirty", "time_utc", "versions", "machine", "device"}
    assert found["checkpoint_digest"] is None
    assert json.loads(json.dumps(found)) == found


def test_commit_and_whether_tracked_files_differ_from_it(tmp_path: Path) -> None:
    git(tmp_path, "init")
    assert git_state(tmp_path) == (UNKNOWN, False)  # no commit yet
    (tmp_path / "a.txt").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    commit, dirty = git_state(tmp_path)
    assert len(commit) == 40 and not dirty
    (tmp_path / "untracked.txt").write_text("results do not make the code another")
    assert git_state(tmp_path) == (commit, False)
    (tmp_path / "a.txt").write_text("2")
    assert git_state(tmp_path) == (commit, True)


def test_a_folder_inside_another_repository_has_no_commit_of_its_own(tmp_path: Path) -> None:
    git(tmp_path, "init")
    (tmp_path / "a.txt").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "somebody else's")
    inside = tmp_path / "site-packages"
    inside.mkdir()
    assert git_state(inside) == (UNKNOWN, False)


def test_without_git_the_commit_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr("spectrim.records.provenance.shutil.which", lambda _: None)
    assert git_state(tmp_path) == (UNKNOWN, False)
    assert machine()["gpus"] == []


def test_the_lock_is_named_by_its_digest_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOCK", tmp_path / "requirements.lock")
    assert module.lock_digest() == UNKNOWN
    (tmp_path / "requirements.lock").write_bytes(b"torch==1\n")
    assert module.lock_digest() == hashlib.sha256(b"torch==1\n").hexdigest()


def test_versions_and_machine_are_said_without_importing_anything() -> None:
    assert {"python", "numpy"} <= set(versions())
    assert machine()["cores"] >= 1
