"""``--push-to-hub`` against a server on this machine that speaks the upload protocol of the Hugging Face hub."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from spectrim.cli import upload
from spectrim.cli.compress import main
from spectrim.errors import UserError

pytest.importorskip("huggingface_hub")
TOKEN = "hf_a_token_of_this_test"
NAME = "me/small"


class Hub(BaseHTTPRequestHandler):
    """A hub for one user. ``refuses``: the part of the address at which it says no, and the status it says it with."""

    refuses: ClassVar[tuple[str, int]]
    blobs: ClassVar[dict[str, bytes]]
    committed: ClassVar[dict[str, bytes]]
    created: ClassVar[list[str]]

    def do_GET(self) -> None:
        if not self._refused():
            self._answer({"name": "me", "type": "user"} if self.path == "/api/whoami-v2" else None)

    def do_PUT(self) -> None:
        content = self._body()
        if not self._refused():
            self.blobs[hashlib.sha256(content).hexdigest()] = content
            self._answer({})

    def do_POST(self) -> None:
        content, address = self._body(), f"http://{self.headers['Host']}"
        if self._refused():
            return
        if self.path == "/api/repos/create":
            given = json.loads(content)
            self.created.append(f"{given['organization']}/{given['name']}")
            self._answer({"url": f"{address}/{NAME}"})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif self.path == f"/api/models/{NAME}/preupload/main":
            paths = [file["path"] for file in json.loads(content)["files"]]
            modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
            self._answer({"files": [{"path": p, "uploadMode": own, "shouldIgnore": False} for p, own in modes.items()]})
        elif self.path == f"/{NAME}.git/info/lfs/objects/batch":
            asked = json.loads(content)["objects"]
            actions = {"upload": {"href": f"{address}/put"}}
            self._answer({"transfer": "basic", "objects": [{**own, "actions": actions} for own in asked]})
        elif self.path == f"/api/models/{NAME}/commit/main":
            for line in map(json.loads, content.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.committed[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.committed[value["path"]] = self.blobs[value["oid"]]
            self._answer({"commitUrl": f"{address}/{NAME}/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self._answer(None)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _refused(self) -> bool:
        """Say no to a stranger, and where it is told to."""
        where, status = self.refuses
        known = self.path == "/put" or self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if known and not (where and where in self.path):
            return False
        self._answer({"error": "the server says no\nand more"}, status if known else 401)
        return True

    def _answer(self, content: Any, status: int = 200) -> None:
        """Send JSON; None: there is nothing here."""
        body = json.dumps({"error": "not found"} if content is None else content).encode()
        self.send_response(404 if content is None else status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[type[Hub]]:
    """A running hub, whose address is its attribute ``address``."""
    state = {"refuses": ("", 200), "blobs": {}, "committed": {}, "created": []}
    kind: Any = type("OneHub", (Hub,), state)
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        kind.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield kind
        server.shutdown()


COMMAND = [
    *("tiny_nets:build", "--algorithm", "truncation", "--decomposer", "svd_channel", "--params-kept", "0.6"),
    *("--out", "small", "--push-to-hub", NAME),
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a factory of a model."""
    (tmp_path / "tiny_nets.py").write_text(
        "from torch import nn\n\n\ndef build():\n    return nn.Sequential(nn.Linear(48, 64))\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def here(hub: Any, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process find the hub, as ``HF_ENDPOINT`` does for one that starts."""
    constants = pytest.importorskip("huggingface_hub.constants")
    for name, value in {
        "ENDPOINT": hub.address,
        "HF_HUB_DISABLE_XET": True,
        "HF_TOKEN_PATH": str(place / "token"),
        "HF_STORED_TOKENS_PATH": str(place / "tokens"),
    }.items():
        monkeypatch.setattr(constants, name, value)


def test_what_arrives_is_what_lies_in_the_folder(hub: Any, place: Path) -> None:
    own = {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HOME": str(place / "home"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "spectrim.cli.compress", *COMMAND],
        env={**os.environ, **own, "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"uploaded to {NAME}" in done.stdout and hub.created == [NAME]
    files = {path.name: path.read_bytes() for path in (place / "small").iterdir()}
    assert set(files) == {"README.md", "report.csv", "model.safetensors"} and hub.committed == files


@pytest.mark.parametrize("token", ["", "hf_of_somebody_else"])
def test_who_is_not_logged_in_is_told_before_the_work(
    hub: Any,
    here: None,
    place: Path,
    token: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    assert main(COMMAND) == 1
    error = capsys.readouterr().err
    assert error.startswith("spectrim-compress: --push-to-hub needs a login (") and error.count("\n") == 1
    assert not (place / "small").exists() and not hub.created


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the client, which sends a large file so
@pytest.mark.parametrize("where", ["/api/repos/create", "/preupload/", "/objects/batch", "/put", "/commit/"])
def test_a_server_that_refuses_costs_one_line_and_the_folder_stays(
    hub: Any, here: None, place: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    small = place / "small"
    small.mkdir()
    (small / "README.md").write_text("---\nlibrary_name: spectrim\n---\n")
    (small / "model.safetensors").write_bytes(bytes(range(256)) * 20)
    hub.refuses = where, 403
    client = upload.client()
    with pytest.raises(UserError) as refusal:
        upload.push(client, NAME, small)
    said = str(refusal.value)
    assert said.startswith(f"{small} is whole, but was not uploaded (") and len(said.splitlines()) == 1
    assert said.endswith(f"upload it by: hf upload {NAME} {small}")
    assert "403" in said
    assert len(list(small.iterdir())) == 2 and not hub.committed
