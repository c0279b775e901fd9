"""The state of a training on disk: one process at a time, and counts that go on where they were."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from spectrim.errors import UserError
from spectrim.tools import safetensors_stream
from spectrim.training import saved_state
from spectrim.training.fit import Callbacks, Training, fit
from spectrim.training.recipe import Recipe
from spectrim.training.saved_state import StateFile

BATCHES = [(torch.ones(4, 3), torch.zeros(4, dtype=torch.long))]


def test_a_state_is_read_into_memory_of_its_own(tmp_path: Path) -> None:
    """A tensor in a mapped file lies wherever the one before it ends, and kernels round otherwise on such memory."""
    path = tmp_path / "state.safetensors"
    safetensors_stream.save(
        path, {name: torch.ones(size) for name, size in (("a", 3), ("b", 5), ("c", 7))}, {"run": "r"}
    )
    assert all(value.data_ptr() % 64 == 0 for value in saved_state.read(path, "r")[0].values())


def test_a_resumed_training_counts_what_was_read_before_it_stopped(tmp_path: Path) -> None:
    path, training = tmp_path / "state.safetensors", Training(Recipe(4, lr=0.01, precision="float32"), seed=0)

    def trained(read: Counter[str], stop_in: int) -> None:
        def after_epoch(epoch: int, model: nn.Module, optimizer: torch.optim.SGD) -> dict:
            read["train"] += 10 + epoch
            if epoch == stop_in:
                raise KeyboardInterrupt
            return {}

        fit(nn.Linear(3, 2), BATCHES, training, Callbacks(after_epoch=after_epoch), StateFile(path, read=read))

    before, unbroken = Counter(train=100, calibration=7), Counter(train=107, calibration=7)
    with pytest.raises(KeyboardInterrupt):
        trained(before, stop_in=2)
    after = Counter(train=107, calibration=7)  # this process read other things before the training
    trained(after, stop_in=9)
    path.unlink()
    trained(unbroken, stop_in=9)
    assert after == unbroken == {"train": 107 + 10 + 11 + 12 + 13, "calibration": 7}


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    saved_state.write(path, {"a": torch.ones(5)}, {"run": "r"})
    assert saved_state.read(path, "r")[1] == {"run": "r"}
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="is damaged; remove it to start anew$"):
        saved_state.read(path, "r")


def test_a_state_of_an_older_version_has_counted_nothing(tmp_path: Path) -> None:
    path, optimizer = tmp_path / "state.safetensors", torch.optim.SGD(nn.Linear(3, 2).parameters())
    file = StateFile(path, read=Counter(train=5))
    with file.opened(Recipe(1), 0, {}) as state:
        model = nn.Linear(3, 2)
        safetensors_stream.save(
            path, {f"model.{k}": v for k, v in model.state_dict().items()}, {"curve": "[]", "run": state.run}
        )
        assert state.resume(model, optimizer) == [] and file.read == {"train": 5}


def test_a_state_that_is_a_folder_or_unreadable_ends_in_one_line(tmp_path: Path) -> None:
    training = Training(Recipe(1), seed=0)
    with pytest.raises(UserError, match=f"^the state {tmp_path} is a folder; give the path of a file$"):
        fit(nn.Linear(3, 2), BATCHES, training, state=StateFile(tmp_path))
    loop = tmp_path / "loop"
    (tmp_path / "back").symlink_to(loop)
    loop.symlink_to(tmp_path / "back")
    with pytest.raises(UserError, match="^[^\n]*loop cannot be read [^\n]*$"):
        saved_state.read(loop, "run")
