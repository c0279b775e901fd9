"""A release: records and checkpoints come from a folder or a server, and nothing but what its index lists."""

import hashlib
import json
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from spectrim.errors import UserError
from spectrim.fetch import release

NET = "net-data-seed0.safetensors"


def list_files(folder: Path) -> None:
    """Write the index of what lies in a folder."""
    made = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != release.INDEX}
    entries = {name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in made.items()}
    (folder / release.INDEX).write_text(json.dumps({"files": entries}))


def pack(folder: Path, members: dict[str, str]) -> None:
    with zipfile.ZipFile(folder / release.RECORDS, "w") as packed:
        for name, text in members.items():
            packed.writestr(name, text)
    list_files(folder)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a release of one record and one checkpoint."""
    monkeypatch.setenv("SPECTRIM_DATA", str(tmp_path / "cache"))
    monkeypatch.delenv(release.ADDRESS, raising=False)
    made = tmp_path / "a release"  # an address has no spaces
    made.mkdir()
    (made / NET).write_bytes(b"weights")
    pack(made, {"table2/abc.json": "{}"})
    return made


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    """Serve the release on this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as running:
        Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_records_come_from_a_folder_once(folder: Path) -> None:
    found = release.records(str(folder))
    assert [path.relative_to(found).as_posix() for path in found.rglob("*.json")] == ["table2/abc.json"]
    (folder / release.RECORDS).unlink()  # not read again: the index says that it is what lies in the cache
    assert release.records(f"{folder}/") == found


def test_records_and_checkpoints_come_from_a_server(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(release.ADDRESS, server)
    assert (release.records() / "table2" / "abc.json").is_file()
    path = tmp_path / "checkpoints" / NET
    assert release.checkpoint(path) and path.read_bytes() == b"weights"
    assert [left.name for left in path.parent.iterdir() if not left.name.startswith(".")] == [NET]


def test_without_an_address_one_line_says_what_to_set(folder: Path) -> None:
    assert not release.checkpoint(folder / "none.safetensors")
    with pytest.raises(UserError, match="no release is known: set SPECTRIM_RELEASE, or give --fetch") as refusal:
        release.records()
    assert "\n" not in str(refusal.value)


def test_altered_content_is_refused_and_not_kept(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / NET).write_bytes(b"weighty")
    monkeypatch.setenv(release.ADDRESS, str(folder))
    with pytest.raises(UserError, match=f"{NET} could not be fetched: .*altered"):
        release.checkpoint(tmp_path / NET)
    assert not (tmp_path / NET).exists()
    with pytest.raises(UserError, match="has no other.safetensors"):
        release.checkpoint(tmp_path / "other.safetensors")


def test_an_address_may_pin_its_index(folder: Path) -> None:
    sha256 = hashlib.sha256((folder / release.INDEX).read_bytes()).hexdigest()
    assert release.records(f"{folder}#sha256={sha256}").is_dir()
    with pytest.raises(UserError, match=f"{release.INDEX} could not be fetched: .*its sha256 is {sha256}"):
        release.records(f"{folder}#sha256={'0' * 64}")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": {"records.zip": {}}}', '{"files": {"records.zip": 1}}'])
def test_a_damaged_index_is_one_line(text: str, folder: Path) -> None:
    (folder / release.INDEX).write_text(text)
    with pytest.raises(UserError, match="damaged: make it anew with `make release`"):
        release.records(str(folder))


@pytest.mark.parametrize("address", ["http://elsewhere", "/no/such/folder", "ftp://elsewhere"])
def test_an_address_that_cannot_be_read_is_one_line(address: str, folder: Path) -> None:
    with pytest.raises(UserError, match="could not be fetched: .*check SPECTRIM_RELEASE or --fetch"):
        release.records(address)


def test_an_archive_writes_nothing_outside_its_folder(folder: Path, tmp_path: Path) -> None:
    pack(folder, {"../../outside.json": "{}", "/absolute.json": "{}"})
    found = release.records(str(folder))
    assert not list(tmp_path.glob("outside.json")) and not Path("/absolute.json").exists()
    assert {path.name for path in found.iterdir()} == {"outside.json", "absolute.json"}


@pytest.mark.parametrize("name", ["table2/a.py", "conftest.py"])
def test_an_archive_of_other_files_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    pack(folder, {"table2/abc.json": "{}", name: ""})
    with pytest.raises(UserError, match="holds other files than records"):
        release.records(str(folder))
    assert not list((tmp_path / "cache").glob("records-*"))


def test_a_file_that_is_no_archive_is_one_line(folder: Path) -> None:
    (folder / release.RECORDS).write_bytes(b"not a zip")
    list_files(folder)
    with pytest.raises(UserError, match="is no archive"):
        release.records(str(folder))


def test_an_archive_that_unpacks_to_too_much_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "RECORDS_BYTES", 1)
    with pytest.raises(UserError, match="unpacks to more than 1 bytes"):
        release.records(str(folder))
