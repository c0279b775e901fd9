"""A server on this machine that answers as W&B does, as far as a run asks it."""

import gzip
import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

ARTIFACT = {"id": "QXJ0", "state": "PENDING", "artifactSequence": {"id": "c2Vx", "latestArtifact": None}}


class WandBServer(ThreadingHTTPServer):
    """It keeps what it is sent: ``asked``, the queries; ``uploaded``, the files; ``lines``, ``ended`` of the stream."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.uploaded: dict[str, bytes] = {}
        self.lines: dict[str, list[dict[str, Any]]] = {}
        self.ended: list[int] = []

    def answer(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        """What GraphQL returns. An unknown query gets nothing, as from a server that lacks the feature."""
        self.asked.append((name, given))
        match name:
            case "UpsertBucket":
                project = {"id": "cHJv", "name": given["project"], "entity": {"id": "ZW50", "name": "me"}}
                run = {"id": "cnVu", "name": given["name"], "displayName": given["displayName"], "project": project}
                bucket = run | {"config": "{}", "historyLineCount": 0}
                return {"upsertBucket": {"bucket": bucket, "inserted": True}}
            case "CreateRunFiles":
                files = [{"name": one, "uploadUrl": f"{self.address}/file/{one}"} for one in given["files"]]
                return {"createRunFiles": {"runID": "cnVu", "uploadHeaders": [], "files": files}}
            case "CreateArtifact":
                return {"createArtifact": {"artifact": ARTIFACT}}
            case "CreateArtifactManifest":
                file = self.place("wandb_manifest.json")
                return {"createArtifactManifest": {"artifactManifest": {"id": "bWFu", "file": file}}}
            case "CreateArtifactFiles":
                edges = [{"node": self.place(one["name"])} for one in given["input"]["artifactFiles"]]
                return {"createArtifactFiles": {"files": {"edges": edges}}}
            case "CommitArtifact":
                return {"commitArtifact": {"artifact": {"id": ARTIFACT["id"], "digest": "0"}}}
        return {"viewer": {"id": "dmll", "entity": "me", "username": "me"}, "model": None, "project": None}

    def place(self, name: str) -> dict[str, Any]:
        """Where a file of an artifact is to be uploaded."""
        url = {"uploadUrl": f"{self.address}/artifact/{name}", "uploadHeaders": [], "uploadMultipartUrls": None}
        return {"id": "Zmls", "name": name, "displayName": name, "storagePath": name, "artifact": ARTIFACT, **url}

    def streamed(self, sent: dict[str, Any]) -> None:
        """Keep what the stream of a run brings: lines of its files, and its exit status at the end."""
        for name, chunk in sent.get("files", {}).items():
            self.lines.setdefault(name, []).extend(map(json.loads, chunk["content"]))
        if sent.get("complete"):
            self.ended.append(sent["exitcode"])


class Answers(BaseHTTPRequestHandler):
    server: WandBServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def body(self) -> bytes:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content

    def reply(self, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self) -> None:
        sent = json.loads(self.body())
        if self.path != "/graphql":
            self.server.streamed(sent)
            return self.reply({})
        (name,) = re.findall(r"^\s*(?:query|mutation)\s+(\w+)", sent["query"])
        return self.reply({"data": self.server.answer(name, sent.get("variables") or {})})

    def do_PUT(self) -> None:
        self.server.uploaded[self.path] = self.body()
        self.reply({})

    def do_GET(self) -> None:
        self.reply({})


@pytest.fixture
def wandb_server() -> Iterator[WandBServer]:
    """See ``WandBServer``."""
    with WandBServer() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
