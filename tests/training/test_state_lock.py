"""Two processes never continue the same training."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from spectrim.errors import UserError
from spectrim.runs import configuration
from spectrim.training.state_lock import locked

SOURCE = str(Path(configuration.__file__).parents[2])
HOLD = """
import sys, time
from pathlib import Path
from spectrim.training.state_lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""
TRAIN = """
import sys, torch
from pathlib import Path
from torch import nn
from spectrim.errors import UserError
from spectrim.training.fit import Training, fit
from spectrim.training.recipe import Recipe
from spectrim.training.saved_state import StateFile
torch.manual_seed(0)
batches = [(torch.ones(4, 3), torch.zeros(4, dtype=torch.long))]
print("ready", flush=True)
sys.stdin.readline()
try:
    fit(nn.Linear(3, 2), batches, Training(Recipe(300), seed=0), state=StateFile(Path(sys.argv[1])))
except UserError as error:
    print(error)
    sys.exit(3)
"""


def started(program: str, path: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, str(path)]
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline()
    return process


def test_a_second_process_is_told_who_holds_the_file_until_that_ends(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "state.safetensors"
    holder = started(HOLD, path)
    for _ in range(2):  # an attempt changes nothing for the next
        said = f"^{path} is in use by process {holder.pid} on .*; wait for it to end"
        with pytest.raises(UserError, match=said), locked(path):
            pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with locked(path):
        assert not path.exists()
    assert not list(path.parent.iterdir())


def test_three_trainings_at_once_on_one_file_are_one_training(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    processes = [started(TRAIN, path) for _ in range(3)]
    for process in processes:
        process.stdin.write("\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
    ended = [process.communicate(timeout=300) for process in processes]
    codes = sorted(process.returncode for process in processes)
    assert codes[0] == 0 and set(codes) <= {0, 3}, ended
    for process, (said, errors) in zip(processes, ended, strict=True):
        assert "Traceback" not in errors
        assert process.returncode == 0 or (said.count("\n") == 1 and " is in use by process " in said)
    assert list(tmp_path.iterdir()) == [path]


def test_where_a_file_system_has_no_locks_a_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: object, **__: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr("spectrim.training.state_lock.FileLock.acquire", without)
    with locked(tmp_path / "state"):
        assert not list(tmp_path.iterdir())
