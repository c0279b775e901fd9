"""Tracking by W&B, read back by its own reader; and servers that nobody reaches."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spectrim.errors import UserError
from spectrim.runs.tracking import followed
from spectrim.runs.tracking.session import About
from spectrim.runs.tracking.wandb_runs import PATIENCE, WandB

# In processes of their own: W&B starts a service and keeps its state for as long as a process lives.
FOLLOW = """
import sys, time
import pandas as pd
from spectrim.runs.tracking.followed import Followed
from spectrim.runs.tracking.session import About, Results
from spectrim.runs.tracking.wandb_runs import WandB
settings = {"names": {"model": "lenet5", "algorithm": "lossless"}, "commit": "c0ffee"}
about = About("0123456789abcdef", "lenet5-mnist", "table2", "lossless", ("table2", "x" * 80, "table2"), settings)
began = time.monotonic()
run = Followed(WandB(mode=sys.argv[1], dir=sys.argv[2]), about)
run.progress("train", 1, 2, {"loss": 0.75})
if sys.argv[3] == "0":
    layers = pd.DataFrame({"layer": ["conv1", "fc"], "rank": [3, None]})
    files = {"record.json": b"{}", "plan.json": b"{}"}
    log = [{"layer": "conv1", "rank": 3, "measured": 0.5}]
    print(run.finish(Results(log, {"test/loss": 1.25}, {"layers": layers}, files)))
else:
    print(run.finish(None, int(sys.argv[3])))
print(f"the run went on after {time.monotonic() - began} s")
"""


def in_process(folder: Path, mode: str, status: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
    # No account and no other settings of the person who runs the tests.
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "NETRC"))}
    home = {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "WANDB_ERROR_REPORTING": "false", **more}
    command = [sys.executable, "-c", FOLLOW, mode, str(folder / "out"), str(status)]
    return subprocess.run(command, env=kept | home, cwd=folder, capture_output=True, text=True, timeout=120, check=True)


def read_back(folder: Path) -> list[dict[str, Any]]:
    """The entries of the log of the only offline run, by the reader of W&B."""
    (log,) = (folder / "out" / "wandb").glob("offline-run-*-0123456789abcdef/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    own = {"HOME": str(folder), "WANDB_ERROR_REPORTING": "false"}
    printed = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=60, check=True)
    return [json.loads(line) for line in printed.stdout.splitlines() if line.startswith("{")]


def found(entries: list[dict[str, Any]], key: str) -> str:
    """All entries of one kind, as text."""
    return json.dumps([entry for entry in entries if key in json.dumps(entry)])


@pytest.fixture(autouse=True)
def _not_given_up() -> Iterator[None]:
    followed.GIVEN_UP.clear()
    yield
    followed.GIVEN_UP.clear()


def test_an_offline_run_holds_everything(tmp_path: Path) -> None:
    done = in_process(tmp_path, "offline")
    assert done.stdout.startswith("True\nthe run went on") and done.stderr == ""
    text = json.dumps(read_back(tmp_path)).replace('\\\\\\"', '"').replace('\\"', '"')
    for word in ("table2", "lossless", "lenet5-mnist", "c0ffee", "progress/train/loss", "against rank/conv1/measured"):
        assert word in text
    for word in ("test/loss", "run-0123456789abcdef", "record.json", "plan.json", "memory_percent", "layers"):
        assert word in text
    assert "x" * 64 in text and "x" * 65 not in text  # the longest tag that W&B takes


def test_a_run_that_fails_leaves_its_exit_status(tmp_path: Path) -> None:
    in_process(tmp_path, "offline", status=143)
    assert "143" in found(read_back(tmp_path), "exit")


def test_nobody_is_asked_to_log_in(tmp_path: Path) -> None:
    done = in_process(tmp_path, "online")
    assert done.stdout.startswith("False\nthe run went on")
    assert done.stderr.count("\n") == 1 and "wandb login" in done.stderr


def test_a_server_that_never_answers_costs_its_patience_and_one_line(tmp_path: Path) -> None:
    with socket.socket() as silent:  # It takes connections, and says nothing.
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = in_process(tmp_path, "online", WANDB_BASE_URL=address, WANDB_API_KEY="0" * 40)
    assert done.stderr.startswith("spectrim: warning: W&B tracking is off from here on: ")
    assert done.stderr.count("\n") == 1
    assert PATIENCE <= float(done.stdout.split()[-2]) < 6 * PATIENCE  # a busy machine needs long for the import alone


def test_a_run_is_told_to_a_server_while_it_goes_on_and_to_its_end(wandb_server: Any, tmp_path: Path) -> None:
    done = in_process(tmp_path, "online", WANDB_BASE_URL=wandb_server.address, WANDB_API_KEY="0" * 40)
    assert done.stdout.startswith("True\nthe run went on") and done.stderr == ""
    begun = next(given for name, given in wandb_server.asked if name == "UpsertBucket")
    assert (begun["name"], begun["project"], begun["groupName"]) == ("0123456789abcdef", "spectrim", "table2")
    assert '"c0ffee"' in begun["config"] and begun["displayName"] == "lenet5-mnist" and begun["jobType"] == "lossless"
    rows = wandb_server.lines["wandb-history.jsonl"]
    assert [row["progress/train/loss"] for row in rows if "progress/train/loss" in row] == [0.75]
    assert [row["against rank/conv1/measured"] for row in rows if "against rank/conv1/measured" in row] == [0.5]
    assert wandb_server.lines["wandb-summary.json"][-1]["test/loss"] == 1.25 and wandb_server.ended == [0]
    sent = wandb_server.uploaded
    assert sent["/artifact/record.json"] == sent["/artifact/plan.json"] == b"{}"
    assert json.loads(sent["/artifact/layers.table.json"])["data"] == [["conv1", 3], ["fc", None]]
    assert [name for name, _ in wandb_server.asked].count("CommitArtifact") == 2  # the table, and the files


def test_a_run_that_fails_is_told_to_a_server_with_its_exit_status(wandb_server: Any, tmp_path: Path) -> None:
    given = {"WANDB_BASE_URL": wandb_server.address, "WANDB_API_KEY": "0" * 40}
    assert in_process(tmp_path, "online", status=143, **given).stdout.startswith("True\n")
    assert wandb_server.ended == [143]


def test_an_offline_run_is_sent_later_by_wandb_sync(wandb_server: Any, tmp_path: Path) -> None:
    in_process(tmp_path, "offline")
    (run,) = (tmp_path / "out" / "wandb").glob("offline-run-*-0123456789abcdef")
    own = {"HOME": str(tmp_path), "WANDB_ERROR_REPORTING": "false", "WANDB_API_KEY": "0" * 40}
    own["WANDB_BASE_URL"] = wandb_server.address
    command = [sys.executable, "-m", "wandb", "sync", str(run)]
    subprocess.run(command, env=os.environ | own, capture_output=True, timeout=120, check=True)
    assert wandb_server.lines["wandb-summary.json"][-1]["test/loss"] == 1.25 and wandb_server.ended == [0]
    assert wandb_server.uploaded["/artifact/record.json"] == b"{}"


def test_without_the_package_a_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "as before")  # so that it is put back at the end
    monkeypatch.delenv("WANDB_ERROR_REPORTING")
    monkeypatch.setitem(sys.modules, "wandb", None)
    followed.Followed(WandB(dir=str(tmp_path)), About("0" * 16, "run", "table2", "lossless"))
    said = capsys.readouterr().err
    assert "tracking is off" in said and "spectrim[tracking]" in said
    # Error reports look up a host. They are off before the import.
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"


@pytest.mark.parametrize("setting", [{"mode": "on"}, {"project": 3}])
def test_a_wrong_setting_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(setting))):
        WandB(**setting)
