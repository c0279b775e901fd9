"""What is on this machine is enough: a run, a tracked run and a decoder in a folder ask no host for anything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spectrim.runs import configuration

SOURCE = str(Path(configuration.__file__).parents[2])
# The audit hook ends the process at a look-up of a name, or at a connection beyond this machine.
GUARD = """
import os, sys
def guard(event, args):
    if event == "socket.connect":
        host = args[1][0] if isinstance(args[1], tuple) else ""  # else a path on this machine
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.sendto"):
        host = args[1][0] if event == "socket.sendto" else args[0]
    else:
        return
    if host not in (None, "", "localhost", "127.0.0.1", "::1", b"localhost", b"127.0.0.1"):
        os.write(2, f"NETWORK {event} {host}\\n".encode())
        os._exit(99)
sys.addaudithook(guard)
"""
RUN = """
from spectrim.cli import commands
sys.argv = ["spectrim", *sys.argv[1:]]
commands.compress()
"""
DECODER = """
import torch
from spectrim import language
from spectrim.fetch import pretrained
from spectrim.models.language import causal_lm
model, words = causal_lm(sys.argv[1]), pretrained.tokenizer(sys.argv[1])
assert words("w1 w2")["input_ids"]
"""


def guarded(code: str, arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a process that ends where it turns to the network."""
    environment = os.environ | {"PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", GUARD + code, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    "code",
    ["socket.getaddrinfo('example.com', 443)", "socket.socket().connect(('192.0.2.1', 443))"],
    ids=["a name", "an address"],
)
def test_the_guard_sees_what_turns_to_the_network(code: str, tmp_path: Path) -> None:
    done = guarded(f"import socket\n{code}", [], tmp_path)
    assert done.returncode == 99 and done.stderr.startswith("NETWORK socket.")


@pytest.mark.parametrize("tracking", ["none", "wandb"])
def test_a_run_asks_no_host(tracking: str, digits: list[str], tmp_path: Path) -> None:
    if tracking == "wandb":
        pytest.importorskip("wandb")
    words = [*digits, "algorithm=truncation", f"tracking={tracking}", "hydra/job_logging=none"]
    done = guarded(RUN, words, tmp_path)
    assert done.returncode == 0 and "NETWORK" not in done.stderr, done.stderr
    assert len(list((tmp_path / "runs").glob("*.json"))) == 1


def test_a_decoder_in_a_folder_asks_no_host(word_folder: Path, tmp_path: Path) -> None:
    done = guarded(DECODER, [str(word_folder)], tmp_path)
    assert done.returncode == 0 and "NETWORK" not in done.stderr, done.stderr
