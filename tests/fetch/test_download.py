"""Files known by their content."""

import errno
import hashlib
import io
import os
import re
import socket
import stat
import subprocess
import tarfile
import time
from collections.abc import Iterator
from contextlib import suppress
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.error import URLError
from urllib.request import Request

import pytest

from spectrim.data import cifar10, fashion_mnist, mnist
from spectrim.fetch import download, get
from spectrim.fetch.download import Package, Unavailable, Url

CONTENT = b"forty-two bytes or so"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PACKAGE = Package(client="npm", name="thing", version="1.0", file="thing-1.0.tgz", sha256=SHA256, size=len(CONTENT))


class Server(BaseHTTPRequestHandler):
    """Sends CONTENT, or what the path asks for: endlessly, slowly, in part, elsewhere or an error."""

    def do_GET(self) -> None:
        if self.path == "/moved.bin":
            self.send_response(302)
            self.send_header("Location", "/published.bin")
            self.end_headers()
            return
        self.send_response(404 if self.path == "/missing.bin" else 200)
        self.end_headers()
        with suppress(OSError):  # until the client hangs up
            if self.path == "/endless.bin":
                while True:
                    self.wfile.write(bytes(1 << 16))
            if self.path == "/slow.bin":
                for byte in CONTENT:
                    self.wfile.write(bytes([byte]))
                    time.sleep(1)
            self.wfile.write(CONTENT[:5] if self.path == "/part.bin" else CONTENT)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    """The address of a server on this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        running.daemon_threads, running.block_on_close = True, False
        Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture
def url(server: str) -> Url:
    return Url(f"{server}/published.bin", SHA256, len(CONTENT))


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


@pytest.mark.parametrize(
    ("name", "sha256", "size", "reason"),
    [
        ("published.bin", "0" * 64, len(CONTENT), f"arrived truncated or altered .*{SHA256}.* and was deleted"),
        ("published.bin", SHA256[:8], len(CONTENT), "arrived truncated or altered"),
        ("part.bin", SHA256, len(CONTENT), "arrived truncated or altered"),
        ("published.bin", SHA256, len(CONTENT) - 1, f"it sends more than the expected {len(CONTENT) - 1} bytes"),
        ("endless.bin", SHA256, len(CONTENT), f"it sends more than the expected {len(CONTENT)} bytes"),
        ("slow.bin", SHA256, len(CONTENT), "it took longer than 2 seconds and was ended"),
        ("missing.bin", SHA256, len(CONTENT), "HTTP 404"),
    ],
)
def test_a_download_that_is_not_as_pinned_ends_soon_and_leaves_nothing(
    server: str, inbox: Path, monkeypatch: pytest.MonkeyPatch, name: str, sha256: str, size: int, reason: str
) -> None:
    monkeypatch.setattr(download, "PATIENCE_SECONDS", 2.0 if name == "slow.bin" else 60.0)
    began = time.monotonic()
    with pytest.raises(Unavailable, match=f"^[^\n]*{reason}[^\n]*$"):
        Url(f"{server}/{name}", sha256, size).fetch(inbox)
    assert time.monotonic() - began < 15 and not list(inbox.iterdir())


def test_a_server_that_is_not_there(server: str, inbox: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/x.bin"
        with pytest.raises(Unavailable, match="x.bin failed .*Connection refused"):
            Url(address, SHA256, 9).fetch(inbox)


def test_a_redirect_is_followed_but_not_from_https_to_http(server: str, inbox: Path) -> None:
    assert Url(f"{server}/moved.bin", SHA256, len(CONTENT)).fetch(inbox).read_bytes() == CONTENT
    for target in ("http://elsewhere/x", "ftp://elsewhere/x", "file:///etc/passwd"):
        with pytest.raises(URLError, match="redirects to .*, which is not https"):
            get.Redirects().redirect_request(Request("https://here/x"), None, 302, "", Message(), target)


@pytest.mark.parametrize("address", ["http://elsewhere/x.bin", "ftp://elsewhere/x.bin", "x.bin"])
def test_only_https_is_fetched(inbox: Path, address: str) -> None:
    with pytest.raises(Unavailable, match="x.bin failed .only https is fetched"):
        Url(address, SHA256, 9).fetch(inbox)


def test_every_address_of_a_data_set_is_https_and_pinned() -> None:
    routes = [route for module in (cifar10, fashion_mnist, mnist) for route in module.SOURCE.routes]
    urls = [file for route in routes for file in route.files if isinstance(file, Url)]
    assert len(urls) == 9 and all(url.address.startswith("https://") and url.size > 1000 for url in urls)
    files = [file for route in routes for file in route.files]
    assert all(re.fullmatch("[0-9a-f]{64}", str(file.sha256)) for file in files)


def test_full_disk_is_not_taken_for_a_dead_address(url: Url, inbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "GET", inbox.parent / "full.py")
    download.GET.write_text("import sys; sys.exit('No space left on device')")
    with pytest.raises(OSError, match="No space left") as caught:
        url.fetch(inbox)
    assert caught.value.errno == errno.ENOSPC
    assert not list(inbox.iterdir())


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("sleep 60 & wait", "it took longer than 1 seconds and was ended"),
        ("while :; do head -c 1000000 /dev/zero >> thing-1.0.tgz; done", "it wrote more than 1000042 bytes"),
    ],
)
def test_a_client_without_an_end_is_ended_with_what_it_started(
    tmp_path: Path, inbox: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    monkeypatch.setattr(download, "PATIENCE_SECONDS", 1.0 if "sleep" in script else 60.0)
    monkeypatch.setattr(download, "CLIENT_BYTES", 1_000_000)
    install_client(tmp_path, monkeypatch, "npm", f"echo $$ > {tmp_path}/group; {script}")
    with pytest.raises(Unavailable, match=reason):
        PACKAGE.fetch(inbox)
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.killpg(int((tmp_path / "group").read_text()), 0)
            time.sleep(0.1)
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


def test_the_setup_of_a_source_distribution_is_not_run(
    tmp_path: Path, inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark, shelf = tmp_path / "was-run", tmp_path / "shelf"
    shelf.mkdir()
    setup = f"open({str(mark)!r}, 'w')\nfrom setuptools import setup\nsetup(name='thing', version='1.0')\n".encode()
    with tarfile.open(shelf / "thing-1.0.tar.gz", "w:gz") as archive:
        for name, content in (("setup.py", setup), ("PKG-INFO", b"Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")):
            entry = tarfile.TarInfo(f"thing-1.0/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(shelf)), ("NO_BUILD_ISOLATION", "0")):
        monkeypatch.setenv(f"PIP_{name}", value)  # pip's own settings of a machine whose index has no wheel
    pip = Package(client="pip", name="thing", version="1.0", file="thing.whl", sha256=SHA256, size=1)
    with pytest.raises(Unavailable, match="Could not find a version"):
        pip.fetch(inbox)
    assert not mark.exists()
    source = tuple(word for word in pip.command if not word.startswith("--only-binary"))
    subprocess.run([*source, "--quiet"], cwd=tmp_path, check=False, capture_output=True, timeout=120)
    assert mark.exists()  # so the option alone keeps it from running
