"""Files of transformers that are damaged, pinned ones of packages, and names of the hub without a network."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from spectrim.errors import UserError
from spectrim.fetch import pretrained
from spectrim.models.language import causal_lm

DEEP = "[" * 100_000 + "]" * 100_000
CONFIG: list[dict[str, Any]] = [{"hidden_size": -3}, {"n_layer": "x"}, {"n_embd": 0}, {"vocab_size": 10**12}]


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("content", ["null", "", DEEP, "5", "{"])
def test_a_file_of_nonsense_is_said_in_one_line(word_folder: Path, file: str, content: str) -> None:
    (word_folder / file).write_text(content)
    with pytest.raises(UserError, match="cannot be opened by transformers' Auto") as refusal:
        causal_lm(str(word_folder)) if file == "config.json" else pretrained.tokenizer(str(word_folder))
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 600


def test_an_id_that_no_tokenizer_can_have_is_said_in_one_line(word_folder: Path) -> None:
    path = word_folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    whole["model"]["vocab"]["w3"] = 2**70
    path.write_text(json.dumps(whole))
    with pytest.raises(UserError, match="cannot be opened by transformers' AutoTokenizer"):
        pretrained.tokenizer(str(word_folder))


@pytest.mark.parametrize("change", CONFIG, ids=str)
def test_a_configuration_of_nonsense_is_said_in_one_line(word_folder: Path, change: dict[str, Any]) -> None:
    path = word_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=r"cannot be opened by|have other shapes than its config.json") as refusal:
        causal_lm(str(word_folder))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("change", [{"torch_dtype": "nonsense"}, {"dtype": 5}, {"architectures": [5]}], ids=str)
def test_what_the_configuration_says_of_type_and_class_does_not_matter_to_a_dense_model(
    word_folder: Path, change: dict[str, Any]
) -> None:
    path = word_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert next(causal_lm(str(word_folder)).parameters()).is_floating_point()


def test_configuration_and_tokenizer_of_packaged_models_are_pinned_with_the_weights() -> None:
    for bundle in pretrained.PACKAGED.values():
        assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= bundle.sha256.keys()
        assert all(len(digest) == 64 for digest in bundle.sha256.values())


OFFLINE = """
import sys, time
from spectrim.errors import UserError
from spectrim.fetch import pretrained
pretrained.library()
begin = time.monotonic()
try:
    pretrained.opened("AutoConfig", sys.argv[1])
    print("opened")
except UserError as error:
    print(error)
print(time.monotonic() - begin)
"""


def test_a_hub_name_without_a_network_takes_seconds_and_one_line(
    word_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    kept = tmp_path / "hub" / "hub" / "models--some--model"
    for name, said in (("some/model", "opened"), ("some/other", "cannot be opened by transformers' AutoConfig")):
        (kept / "refs").mkdir(parents=True, exist_ok=True)
        (kept / "refs" / "main").write_text("a" * 40)
        shutil.copytree(word_folder, kept / "snapshots" / ("a" * 40), dirs_exist_ok=True)
        done = subprocess.run([sys.executable, "-c", OFFLINE, name], capture_output=True, text=True, check=True)
        first, seconds = done.stdout.splitlines()
        assert said in first and float(seconds) < 10 and "retry" not in done.stderr.lower()


class Silent(BaseHTTPRequestHandler):
    """Answers whatever the path asks for: an error, or nothing for long."""

    def do_HEAD(self) -> None:
        if self.path == "/silent":
            time.sleep(20)
        self.send_error(403)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``ask(path)``: whether a hub at this path of a server here answers."""
    constants = pytest.importorskip("huggingface_hub.constants")
    with HTTPServer(("127.0.0.1", 0), Silent) as server:
        Thread(target=server.serve_forever, daemon=True).start()

        def asked(path: str) -> bool:
            monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}{path}")
            return pretrained.hub_answers.__wrapped__()

        yield asked
        Thread(target=server.shutdown, daemon=True).start()


def test_a_hub_that_refuses_answers_and_one_that_says_nothing_does_not(
    ask: Callable[[str], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask("/refuses")
    begin = time.monotonic()
    assert not ask("/silent") and time.monotonic() - begin < 3
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not ask("/refuses")
