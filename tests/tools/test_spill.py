"""Decompositions on the disk give what those in memory give, and leave nothing behind."""

import copy
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.matrix import MatrixSpectrum
from spectrim.decomposers.svd import SVD
from spectrim.decomposers.whitened import WhitenedSVD
from spectrim.errors import UserError
from spectrim.runs import configuration, targets
from spectrim.statistics.objective import Objective
from spectrim.tools import files, spill
from spectrim.tools.spill import SpilledTensors, SpillFolder

NAMES = sorted(path.stem for path in (Path(configuration.CONF) / "decomposer").glob("*.yaml"))


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def _in_blocks(objective: Objective, size: int) -> Objective:
    return Objective(objective.loss, objective.splits, layers_at_once=size)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_the_curves_and_the_model_are_the_same(
    compose: Any, net: nn.Module, objective: Objective, name: str, size: int
) -> None:
    decomposer = targets.build(configuration.plain(compose(f"decomposer={name}").decomposer))
    usual = Workbench.of(net, decomposer, objective)
    spared = Workbench.of(copy.deepcopy(net), decomposer, _in_blocks(objective, size))
    for one, other in zip(usual.spectra.values(), spared.spectra.values(), strict=True):
        assert isinstance(other, MatrixSpectrum) == isinstance(getattr(other, "_vectors", None), SpilledTensors)
        for curve in ("error", "weighted_error", "largest_entry"):
            torch.testing.assert_close(getattr(other, curve)(), getattr(one, curve)())
        assert (one.break_even, one.kept(2), one.sizes(2)) == (other.break_even, other.kept(2), other.sizes(2))
    first, second = (bench.finish(dict.fromkeys(bench.spectra, 2)) for bench in (usual, spared))
    assert first.plan == second.plan
    for key, value in first.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[key], value, msg=key)


def test_a_layer_is_decomposed_once_all_the_same(net: nn.Module, objective: Objective) -> None:
    first = Workbench.of(net, SVD(), _in_blocks(objective, 2))
    assert Workbench.of(net, SVD(), _in_blocks(objective, 2)).spectra.items() == first.spectra.items()
    assert Workbench.of(net, SVD(), objective).spectra.items() == first.spectra.items()


def test_nothing_is_left_once_nobody_needs_it(net: nn.Module, objective: Objective, temporary: Path) -> None:
    bench = Workbench.of(copy.deepcopy(net), WhitenedSVD(), _in_blocks(objective, 2))
    files = list(temporary.rglob("*.safetensors"))
    assert len(files) == len(bench.spectra) == 4
    kept = bench.spectra["3"]
    del bench
    gc.collect()
    assert isinstance(kept, MatrixSpectrum) and kept.svd.U_OR.isfinite().all()  # one that is left holds the folder
    del kept
    gc.collect()
    assert not list(temporary.iterdir())


def test_a_full_disk_ends_in_one_line(
    net: nn.Module, objective: Objective, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spill, "save_file", full)
    with pytest.raises(UserError, match="^cannot spill decompositions [^\n]*No space left[^\n]*set TMPDIR[^\n]*$"):
        Workbench.of(net, SVD(), _in_blocks(objective, 1))


def test_tensors_come_back_as_they_were() -> None:
    spilled = SpillFolder().write({"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(1, dtype=torch.float64)})
    read = spilled.read()
    assert read["a"].equal(torch.arange(6.0).reshape(2, 3).T) and read["b"].dtype == torch.float64


def test_what_a_killed_process_left_goes_with_the_next_folder_and_what_a_living_one_holds_stays(
    temporary: Path,
) -> None:
    code = """
import torch
from spectrim.tools.spill import SpillFolder
spilled = SpillFolder().write({"a": torch.ones(3)})
print(flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"TMPDIR": str(temporary)},
    ) as other:
        assert other.stdout is not None and other.stdout.readline()
        (left,) = temporary.iterdir()
        own = SpillFolder()
        assert [path.name for path in (left / files.MADE).iterdir()] == ["0.safetensors"]
        other.send_signal(signal.SIGKILL)
    second = SpillFolder()
    assert sorted(temporary.iterdir()) == sorted([own._folder.parent, second._folder.parent])


def test_a_location_that_cannot_be_written_is_said_in_one_line(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (temporary / "file").touch()
    monkeypatch.setattr("tempfile.tempdir", str(temporary / "file"))
    with pytest.raises(UserError, match="^cannot spill decompositions to [^\n]*file [^\n]*set TMPDIR[^\n]*$"):
        SpillFolder()
