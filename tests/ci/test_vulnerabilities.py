"""The check for known vulnerabilities: what it asks, when it fails, and that it needs no network."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / ".ci" / "vulnerabilities.py"
CLEAN: dict[str, Any] = {"results": [{}, {}]}
ONE = {"results": [{}, {"vulns": [{"id": "GHSA-xxxx", "modified": "2026-01-01T00:00:00Z"}]}]}


@contextmanager
def database(answer: bytes) -> Iterator[tuple[str, list[Any]]]:
    """A database that gives ``answer``: its address, and what it was asked."""
    asked: list[Any] = []

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "some.lock"
    path.write_text("# a comment\nbeta==2.0 \\\n    --hash=sha256:aa==\nalpha==1.0rc1\n")
    return path


def check(lock: Path, address: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, lock, "--address", address], capture_output=True, text=True)


def test_every_pin_is_asked_for_once(lock: Path) -> None:
    with database(json.dumps(CLEAN).encode()) as (address, asked):
        done = check(lock, address)
    assert done.returncode == 0 and "0 in 2 packages" in done.stdout
    (queries,) = [one["queries"] for one in asked]
    assert [(one["package"]["name"], one["version"]) for one in queries] == [("alpha", "1.0rc1"), ("beta", "2.0")]


def test_a_known_vulnerability_fails_and_is_named(lock: Path) -> None:
    with database(json.dumps(ONE).encode()) as (address, _):
        done = check(lock, address)
    assert done.returncode == 1
    assert "beta 2.0: https://osv.dev/vulnerability/GHSA-xxxx" in done.stdout


@pytest.mark.parametrize("answer", [b"<html>", b"{}", b'{"results": []}', b"[]"])
def test_an_answer_that_is_none_is_not_taken_for_a_clean_one(lock: Path, answer: bytes) -> None:
    with database(answer) as (address, _):
        done = check(lock, address)
    assert done.returncode == 0
    assert done.stdout.startswith("known vulnerabilities: not checked") and not done.stderr


def test_without_a_network_it_says_so_at_once(lock: Path) -> None:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as closed:
        port = closed.server_port
    started = time.monotonic()
    done = check(lock, f"http://127.0.0.1:{port}/")
    assert done.returncode == 0 and "not checked" in done.stdout
    assert time.monotonic() - started < 10
