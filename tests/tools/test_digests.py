"""The sha256 of files."""

import hashlib
from pathlib import Path

import pytest

from spectrim.errors import UserError
from spectrim.tools import digests

SHA256 = hashlib.sha256(b"weights").hexdigest()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "weights").write_bytes(b"weights")
    return tmp_path / "weights"


def test_a_digest_is_that_of_the_bytes(path: Path) -> None:
    assert digests.of_file(path) == SHA256
    digests.require(path, SHA256)


@pytest.mark.parametrize("missing", ["none", "."])
def test_a_file_that_cannot_be_read_is_a_user_error(tmp_path: Path, missing: str) -> None:
    with pytest.raises(UserError, match="^cannot read [^\n]*$"):
        digests.of_file(tmp_path / missing)


def test_another_digest_is_refused_in_one_line(path: Path) -> None:
    with pytest.raises(UserError, match=f"^[^\n]*weights has another sha256 than the one given: {SHA256}; [^\n]*$"):
        digests.require(path, "0" * 64)


@pytest.mark.parametrize("part", ["", SHA256[:8], SHA256[:63], SHA256.upper(), f"{SHA256}\n", None, 5])
def test_a_part_of_a_digest_is_refused(path: Path, part: str) -> None:
    with pytest.raises(UserError, match="is not a sha256; give all 64 hex digits"):
        digests.require(path, part)
