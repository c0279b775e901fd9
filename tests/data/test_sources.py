"""The cache of public image sets: verified, written whole or not at all."""

import errno
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from spectrim.data import sources
from spectrim.data.sources import Arrays, Route, Source, load
from spectrim.errors import UserError
from spectrim.fetch import cache as cache_module
from spectrim.fetch.download import Package, Url
from spectrim.tools import files

CONTENT = bytes(range(8))


def decode(paths: Sequence[Path]) -> Arrays:
    images = torch.frombuffer(bytearray(paths[0].read_bytes()), dtype=torch.uint8).view(2, 1, 2, 2)
    return Arrays(images, torch.tensor([0, 1]), images.flip(0), torch.tensor([1, 0]))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECTRIM_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def official(tmp_path: Path) -> Path:
    path = tmp_path / "official.bin"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def source(official: Path) -> Source:
    return make(official)


def make(official: Path, second: Path | None = None) -> Source:
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    routes = tuple(Route((Url(path.as_uri(), sha256, len(CONTENT)),), decode) for path in (official, second) if path)
    return Source(
        "tiny", routes, decode([official]).sha256() if official.exists() else decode([second or official]).sha256()
    )


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_fetched_once_then_read_from_the_cache(source: Source, cache: Path, official: Path) -> None:
    first = load(source)
    assert visible(cache) == ["tiny.safetensors"]
    official.unlink()
    again = load(source)
    assert again.sha256() == first.sha256() == source.sha256
    assert again.test_images.equal(first.test_images)


def test_the_second_route_where_the_first_fails(tmp_path: Path, cache: Path, official: Path) -> None:
    elsewhere = tmp_path / "package.bin"
    elsewhere.write_bytes(CONTENT)
    expected = make(official).sha256
    official.write_bytes(CONTENT[:5])
    source = Source("tiny", make(elsewhere).routes, expected)
    broken = Source(
        "tiny", (Route((Url(official.as_uri(), "0" * 64, len(CONTENT)),), decode), *source.routes), expected
    )
    assert load(broken).sha256() == expected


def test_no_route_says_what_was_tried_and_what_to_do_by_hand(
    source: Source, cache: Path, official: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    package = Package(client="npm", name="tiny", version="1.0", file="tiny-1.0.tgz", sha256="0" * 64, size=8)
    source = Source("tiny", (*source.routes, Route((package,), decode)), source.sha256)
    official.unlink()
    with pytest.raises(UserError) as caught:
        load(source)
    message = str(caught.value)
    assert "\n" not in message
    assert f"{official.as_uri()} failed" in message
    assert "npm is not installed" in message
    assert f"put into {cache / 'downloads'} official.bin from" in message
    assert "tiny-1.0.tgz from `npm pack tiny@1.0`" in message
    assert visible(cache) == []


def test_file_put_in_place_by_hand(source: Source, cache: Path, official: Path) -> None:
    (cache / "downloads").mkdir(parents=True)
    official.rename(cache / "downloads" / "official.bin")
    assert load(source).sha256() == source.sha256


def test_wrong_file_put_in_place_by_hand_is_named_and_left(source: Source, cache: Path) -> None:
    placed = cache / "downloads" / "official.bin"
    placed.parent.mkdir(parents=True)
    placed.write_bytes(b"something else")
    with pytest.raises(UserError, match=r"downloads/official.bin is truncated or another file than expected"):
        load(source)
    assert placed.exists()


def test_altered_download(source: Source, cache: Path, official: Path) -> None:
    official.write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match=r"official.bin arrived truncated or altered .* and was deleted"):
        load(source)
    assert visible(cache) == []


def test_route_that_decodes_to_other_images_is_refused(source: Source, cache: Path) -> None:
    with pytest.raises(UserError, match="other images or labels than expected"):
        load(Source("tiny", source.routes, "0" * 64))
    assert visible(cache) == []


def test_truncated_cache_file(source: Source, cache: Path) -> None:
    load(source)
    kept = cache / "tiny.safetensors"
    kept.write_bytes(kept.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"tiny.safetensors is truncated .* delete it and run again"):
        load(source)


def test_altered_cache_file(source: Source, cache: Path) -> None:
    load(source)
    kept = cache / "tiny.safetensors"
    content = bytearray(kept.read_bytes())
    content[-1] ^= 1
    kept.write_bytes(content)
    with pytest.raises(UserError, match="its content was altered; delete it and run again"):
        load(source)


def test_no_room_on_the_disk_leaves_nothing(source: Source, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"no room on the disk for tiny in .*SPECTRIM_DATA"):
        load(source)
    assert visible(cache) == []


def test_cache_folder_that_cannot_be_made(source: Source, official: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRIM_DATA", str(official / "below-a-file"))
    with pytest.raises(UserError, match=r"tiny cannot be kept in .*SPECTRIM_DATA"):
        load(source)


def test_leftovers_of_a_killed_process_are_cleared(source: Source, cache: Path) -> None:
    left = cache / f".spectrim.{files._machine()}.{'0' * 16}.tmp"
    (left / files.MADE / "npm-work").mkdir(parents=True)
    (left / files.LOCK).touch()
    load(source)
    assert visible(cache) == ["tiny.safetensors"]


def test_two_at_once_fetch_once(source: Source, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []
    original = sources._fetch_into

    def counted(kept: Path, what: Source) -> None:
        fetched.append(kept)
        original(kept, what)

    monkeypatch.setattr(sources, "_fetch_into", counted)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: load(source).sha256(), range(2)))
    assert results == [source.sha256] * 2
    assert len(fetched) == 1


def test_a_lock_held_for_too_long(source: Source, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    monkeypatch.setattr(cache_module, "LOCK_SECONDS", 0.1)
    with FileLock(cache / ".tiny.lock"), pytest.raises(UserError, match="another process has been fetching"):
        load(source)


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECTRIM_DATA", "~/sets")
    assert cache_module.cache_folder() == Path.home() / "sets"
    monkeypatch.delenv("SPECTRIM_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/me")
    assert cache_module.cache_folder() == Path("/var/cache/me/spectrim")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_module.cache_folder() == Path.home() / ".cache" / "spectrim"
