"""A killed selection goes on where it was: what it had computed is read, and nothing stale is ever taken."""

import copy
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spectrim
from spectrim.errors import UserError
from spectrim.tools import resume
from spectrim.tools.content import content, of_function, of_model
from spectrim.tools.resume import Result, ResumeFolder

JOINT = spectrim.Joint(params_kept=0.5, samples=30, refit=30)
CHOICES: list[tuple[Any, Any, set[str]]] = [
    (JOINT, spectrim.BestView(spectrim.WhitenedSVD(samples=30)), {"inputs", "whitened", "gates", "weights", "fit"}),
    (JOINT, spectrim.TwoSidedSVD(samples=30), {"inputs", "outputs", "whitened", "gates", "weights", "fit"}),
    (JOINT, spectrim.SVD(), {"svd", "gates", "weights", "fit"}),
    (spectrim.Lossless(), spectrim.SubspaceSVD(), {"svd", "largest", "gradients"}),
    (spectrim.Truncation(ratio=0.5), spectrim.Tucker2(), {"svd"}),
]


@pytest.fixture(autouse=True)
def _keep_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "WORTH_SECONDS", 0.0)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many results of each kind were computed rather than taken up."""
    counted, write = Counter[str](), resume._write

    def counting(path: Path, result: Result) -> None:
        counted[path.name.partition("-")[0]] += 1
        write(path, result)

    monkeypatch.setattr(resume, "_write", counting)
    return counted


def equal(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(("algorithm", "decomposer", "kinds"), CHOICES)
def test_a_second_call_takes_all_up_and_gives_the_same_model(
    net: nn.Module, batches: Any, tmp_path: Path, made: Counter[str], algorithm: Any, decomposer: Any, kinds: set[str]
) -> None:
    call = partial(spectrim.compress, calibration=batches, algorithm=algorithm, decomposer=decomposer)
    without = call(copy.deepcopy(net))
    assert not made
    first = call(copy.deepcopy(net), resume=tmp_path)
    assert set(made) == kinds
    made.clear()
    second = call(copy.deepcopy(net), resume=tmp_path)
    assert not made and without.plan == first.plan == second.plan
    assert equal(without.model, first.model) and equal(without.model, second.model)
    assert without.notes == second.notes and without.log == second.log


@contextmanager
def default_of_64_bits() -> Iterator[None]:
    """A model may make tensors of this kind in its passes."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("settings", [partial(torch.autocast, "cpu", torch.bfloat16), default_of_64_bits])
def test_nothing_is_taken_that_other_settings_of_torch_have_made(
    net: nn.Module, batches: Any, tmp_path: Path, settings: Callable[[], AbstractContextManager]
) -> None:
    call = partial(spectrim.compress, net, calibration=batches, algorithm=JOINT)
    with settings():
        call(resume=tmp_path)
    assert equal(call(resume=tmp_path).model, call().model)


GIVEN = """
import torch, spectrim
from torch import nn
torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.Flatten(), nn.Linear(256, 5)).eval()
given = {
    "calibration": [(torch.randn(16, 3, 8, 8), torch.randint(5, (16,))) for _ in range(3)],
    "algorithm": spectrim.Joint(params_kept=0.5, samples=30, refit=30),
    "decomposer": spectrim.BestView(spectrim.WhitenedSVD(samples=30)),
}
"""
KILLED = """
import os, signal, sys
from spectrim.tools import resume
from spectrim.tools.files import replacing
folder, kill_at = sys.argv[1:]
resume.WORTH_SECONDS, write, count = 0.0, resume._write, 0
def writing(path, result):
    global count
    count += 1
    if count == int(kill_at):
        with replacing(path) as (made,):
            made.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    write(path, result)
resume._write = writing
spectrim.compress(net, **given, resume=folder)
"""


@pytest.mark.parametrize("kill_at", [1, 4, 7, 8])  # the moments, five spectra, then the gates, then the refit
def test_a_killed_selection_goes_on(tmp_path: Path, made: Counter[str], kill_at: int) -> None:
    folder = tmp_path / "resume"
    command = [sys.executable, "-c", GIVEN + KILLED, str(folder), str(kill_at)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    kept = {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.exists() else set()
    assert len(kept) == kill_at - 1
    names: dict[str, Any] = {}
    exec(GIVEN, names)
    net, given = names["net"], names["given"]
    result = spectrim.compress(net, **given, resume=folder)
    assert sum(made.values()) == len(list(folder.iterdir())) - len(kept)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert equal(result.model, spectrim.compress(net, **given).model)


def changed_weight(net: nn.Module, batches: Any) -> Any:
    with torch.no_grad():
        net[6].weight[0, 0] += 1.0  # type: ignore[index]
    return {"calibration": batches}


def other_data(net: nn.Module, batches: Any) -> Any:
    return {"calibration": [(inputs + 0.1, targets) for inputs, targets in batches]}


def other_order(net: nn.Module, batches: Any) -> Any:
    return {"calibration": batches[::-1]}


def other_loss(net: nn.Module, batches: Any) -> Any:
    return {"calibration": batches, "loss": partial(F.cross_entropy, label_smoothing=0.3)}


@pytest.mark.parametrize("change", [changed_weight, other_data, other_order, other_loss])
def test_nothing_stale_is_taken(
    net: nn.Module, batches: Any, tmp_path: Path, made: Counter[str], change: Callable[..., Any]
) -> None:
    spectrim.compress(net, calibration=batches, algorithm=JOINT, resume=tmp_path)
    made.clear()
    given = change(net, batches)
    result = spectrim.compress(net, **given, algorithm=JOINT, resume=tmp_path)
    assert made["gates"] == 1
    assert equal(result.model, spectrim.compress(net, **given, algorithm=JOINT).model)


def test_samples_that_were_read_by_the_killed_process_count(net: nn.Module, batches: Any, tmp_path: Path) -> None:
    from spectrim.statistics.objective import Objective

    counts = []
    for folder in (None, tmp_path, tmp_path):
        objective = Objective(F.cross_entropy, {"calibration": batches})
        with resume.into(folder):
            spectrim.Lossless().compress(copy.deepcopy(net), spectrim.SVD(), objective)
        counts.append(dict(objective.read))
    assert counts == [{"calibration": 39}] * 3


@pytest.mark.parametrize("how", ["cut", "altered", "emptied"])
def test_a_damaged_file_counts_as_absent(tmp_path: Path, how: str) -> None:
    folder = ResumeFolder(tmp_path)
    first = folder.result("sum", lambda: [1], lambda: Result({"a": torch.arange(9.0)}, {"why": "so"}))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-3], "altered": whole[:-1] + b"\x01", "emptied": b""}[how])
    again = folder.result("sum", lambda: [1], lambda: Result({"a": torch.arange(9.0)}, {"why": "so"}))
    assert torch.equal(first.tensors["a"], again.tensors["a"]) and again.texts == {"why": "so"}
    assert path.read_bytes() == whole


def test_what_is_quick_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "WORTH_SECONDS", 60.0)
    ResumeFolder(tmp_path).result("sum", lambda: [1], lambda: Result({"a": torch.ones(1)}))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_refused_first(net: nn.Module, batches: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*/file/result: ") as refusal:
        spectrim.compress(net, calibration=batches, resume=tmp_path / "file")
    assert "\n" not in str(refusal.value)


def test_an_empty_name_is_no_folder(
    net: nn.Module, batches: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="^resume= is an empty name; give a folder, or leave it out$"):
        spectrim.compress(net, calibration=batches, algorithm=JOINT, resume="")
    assert not list(tmp_path.iterdir())


def test_the_digest_of_a_function_covers_its_code_and_what_it_encloses() -> None:
    def scaled(by: float) -> Callable[[Tensor], Tensor]:
        return lambda x: x * by

    assert content(of_function(scaled(2.0))) == content(of_function(scaled(2.0)))
    different = [scaled(3.0), partial(F.mse_loss), partial(F.mse_loss, reduction="sum"), F.cross_entropy, nn.MSELoss()]
    digests = {content(of_function(one)) for one in [scaled(2.0), *different]}
    assert len(digests) == 6
    assert content(of_model(nn.Linear(2, 2))) != content(of_model(nn.Linear(2, 2)))  # other weights


class Weighted:
    """A loss of a user's own with a list among its attributes."""

    def __init__(self, weights: list[float]) -> None:
        self.weights = weights
        self.own: list[Any] = [self]

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sum() * self.weights[0]


class Tempered(nn.Module):
    """A model whose outputs depend on a plain attribute."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, x: Tensor) -> Tensor:
        return x / self.temperature


def enclosing(values: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: x * values[0]


def with_keyword(by: Any) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor, *, scale: Any = by) -> Tensor:
        return x * scale

    return function


def with_default(by: Any) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor, scale: Any = by) -> Tensor:
        return x * scale

    return function


@pytest.mark.parametrize("make", [enclosing, with_keyword, with_default, Weighted, Tempered])
@pytest.mark.parametrize("first", [[2.0], {0: 2.0}, torch.arange(3000.0)])
def test_the_digest_of_a_function_covers_the_values_that_it_holds(make: Callable[[Any], Any], first: Any) -> None:
    if make is Tempered:
        first = 2.0
    second = copy.deepcopy(first) if isinstance(first, list | dict) else first + 0
    assert content(of_function(make(first))) == content(of_function(make(second)))
    if isinstance(first, Tensor):
        second[1500] = 0  # in the middle, which repr leaves out
    else:
        second = {list: [3.0], dict: {0: 3.0}, float: 3.0}[type(first)]
    assert content(of_function(make(first))) != content(of_function(make(second)))
