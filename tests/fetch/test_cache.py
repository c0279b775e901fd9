"""Files made from a package: fetched once, checked at each use, whole or not there."""

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from spectrim.errors import UserError
from spectrim.fetch.cache import Bundle, extract, unpacked
from spectrim.fetch.download import Package

CONTENT = b"what is inside"


def packed(path: Path) -> Path:
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr("deep/inside.txt", CONTENT)
    else:
        with tarfile.open(path, "w:gz") as tar:
            member = tarfile.TarInfo("deep/inside.txt")
            member.size = len(CONTENT)
            tar.addfile(member, io.BytesIO(CONTENT))
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECTRIM_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", "")  # no client: only what lies in downloads/
    return tmp_path / "cache"


@pytest.fixture
def bundle(cache: Path) -> Bundle:
    (cache / "downloads").mkdir(parents=True)
    archive = packed(cache / "downloads" / "thing-1.0.tgz")
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    package = Package("npm", "thing", "1.0", archive.name, sha256, archive.stat().st_size)

    def make(archive: Path, folder: Path) -> None:
        extract(archive, {"deep/inside.txt": "out.txt"}, folder)

    return Bundle("thing", package, make, {"out.txt": hashlib.sha256(CONTENT).hexdigest()})


def test_made_once_and_kept(bundle: Bundle, cache: Path) -> None:
    assert (unpacked(bundle) / "out.txt").read_bytes() == CONTENT
    (cache / "downloads" / "thing-1.0.tgz").unlink()
    assert unpacked(bundle) == cache / "thing"
    assert not list(cache.glob("*.tmp"))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("out.txt", lambda path: path.write_bytes(b"something else")),
        ("out.txt", lambda path: path.write_bytes(b"")),
        ("out.txt", Path.unlink),
        ("added_tokens.json", Path.touch),
        ("deep", Path.mkdir),
    ],
)
def test_a_file_that_is_altered_missing_or_added_is_refused(
    bundle: Bundle, name: str, change: Callable[[Path], object]
) -> None:
    change(unpacked(bundle) / name)
    with pytest.raises(UserError, match=f"{name} is missing, added, truncated or altered; delete .*thing and run"):
        unpacked(bundle)


@pytest.mark.parametrize("pinned", [{"out.txt": "0" * 64}, {}])
def test_files_that_come_out_otherwise_are_not_kept(bundle: Bundle, cache: Path, pinned: dict[str, str]) -> None:
    with pytest.raises(UserError, match="out.txt comes out otherwise than expected, so nothing was kept"):
        unpacked(replace(bundle, sha256=pinned))
    assert not (cache / "thing").exists()


def test_without_a_client_it_says_what_to_do_by_hand(bundle: Bundle, cache: Path) -> None:
    (cache / "downloads" / "thing-1.0.tgz").unlink()
    with pytest.raises(UserError, match=r"npm is not installed\). By hand: put into .* thing-1.0.tgz from") as error:
        unpacked(bundle)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.whl", "a.tgz"])
def test_members_of_wheels_and_tars(tmp_path: Path, name: str) -> None:
    extract(packed(tmp_path / name), {"deep/inside.txt": "out.txt"}, tmp_path)
    assert (tmp_path / "out.txt").read_bytes() == CONTENT
