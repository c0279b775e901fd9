"""Files known by their content."""

import errno
import hashlib
import os
import stat
from pathlib import Path

import pytest

from spectrim.fetch import download
from spectrim.fetch.download import Package, Unavailable, Url

CONTENT = b"forty-two bytes or so"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PACKAGE = Package(client="npm", name="thing", version="1.0", file="thing-1.0.tgz", sha256=SHA256, size=len(CONTENT))


@pytest.fixture
def url(tmp_path: Path) -> Url:
    (tmp_path / "published.bin").write_bytes(CONTENT)
    return Url((tmp_path / "published.bin").as_uri(), SHA256)


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    folder = tmp_path / "inbox"
    folder.mkdir()
    return folder


def install_client(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, script: str) -> None:
    """A client ``name`` on the PATH, before the real one."""
    client = folder / "bin" / name
    client.parent.mkdir()
    client.write_text(f"#!/bin/sh\n{script}\n")
    client.chmod(client.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{client.parent}{os.pathsep}{os.environ['PATH']}")


def test_url_arrives_whole(url: Url, inbox: Path) -> None:
    path = url.fetch(inbox)
    assert path == inbox / "published.bin"
    assert path.read_bytes() == CONTENT


def test_leading_digits_suffice(url: Url, inbox: Path) -> None:
    assert Url(url.address, SHA256[:8]).fetch(inbox).exists()


def test_altered_download_is_deleted(url: Url, inbox: Path) -> None:
    with pytest.raises(Unavailable, match=r"published.bin arrived truncated or altered .* and was deleted"):
        Url(url.address, "0" * 64).fetch(inbox)
    assert not list(inbox.iterdir())


def test_no_network(tmp_path: Path, inbox: Path) -> None:
    with pytest.raises(Unavailable, match="does not answer"):
        Url((tmp_path / "missing.bin").as_uri(), SHA256).fetch(inbox)
    assert not list(inbox.iterdir())


def test_connection_that_breaks_leaves_nothing(url: Url, inbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_response: object, path: Path) -> None:
        path.write_bytes(CONTENT[:5])
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(download, "_write", broken)
    with pytest.raises(Unavailable, match="reset by peer"):
        url.fetch(inbox)
    assert not list(inbox.iterdir())


def test_full_disk_is_not_taken_for_a_dead_address(url: Url, inbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_response: object, path: Path) -> None:
        path.write_bytes(CONTENT[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "_write", full)
    with pytest.raises(OSError, match="No space left") as caught:
        url.fetch(inbox)
    assert caught.value.errno == errno.ENOSPC
    assert not list(inbox.iterdir())


def test_package_by_its_client(tmp_path: Path, inbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_client(
        tmp_path, monkeypatch, "npm", f'[ "$1 $2" = "pack thing@1.0" ] && printf "{CONTENT.decode()}" > thing-1.0.tgz'
    )
    assert PACKAGE.fetch(inbox).read_bytes() == CONTENT


def test_package_of_other_content_is_deleted(tmp_path: Path, inbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_client(tmp_path, monkeypatch, "npm", "echo other > thing-1.0.tgz")
    with pytest.raises(Unavailable, match="truncated or altered"):
        PACKAGE.fetch(inbox)
    assert not list(inbox.rglob("*.tgz"))


def test_client_that_fails_is_quoted(tmp_path: Path, inbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_client(tmp_path, monkeypatch, "npm", "echo 'npm warn chatter'; echo 'npm error code E404' >&2; exit 1")
    with pytest.raises(Unavailable, match=r"`npm pack thing@1.0` failed \(npm error code E404\)"):
        PACKAGE.fetch(inbox)


def test_client_on_a_full_disk(tmp_path: Path, inbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_client(tmp_path, monkeypatch, "npm", "echo 'npm error code ENOSPC'; exit 1")
    with pytest.raises(OSError, match="No space left"):
        PACKAGE.fetch(inbox)


def test_client_that_is_missing(inbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Unavailable, match="npm is not installed"):
        PACKAGE.fetch(inbox)


def test_apt_fetches_its_own_lists_where_the_machine_has_none(
    tmp_path: Path, inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f"""case "$*" in
        "download thing=1.0") echo 'E: Unable to locate package thing'; exit 100;;
        *update) touch updated;;
        *download*) [ -e updated ] && printf "{CONTENT.decode()}" > thing.deb;;
    esac"""
    install_client(tmp_path, monkeypatch, "apt-get", script)
    package = Package(client="apt-get", name="thing", version="1.0", file="thing.deb", sha256=SHA256, size=len(CONTENT))
    assert package.fetch(inbox).read_bytes() == CONTENT


def test_what_to_do_by_hand(url: Url) -> None:
    assert url.by_hand == f"published.bin from {url.address}"
    assert PACKAGE.by_hand == "thing-1.0.tgz from `npm pack thing@1.0`"
    pip = Package(client="pip", name="thing", version="1.0", file="thing.whl", sha256=SHA256, size=1)
    assert pip.command[1:] == ("-m", "pip", "download", "--no-deps", "--only-binary=:all:", "thing==1.0")
