"""A selection has a model for itself: another waits, and what other threads do with the model does not count."""

import multiprocessing
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim
from spectrim.algorithms.refitted import Refitted
from spectrim.surgery.find_layers import ELSEWHERE
from spectrim.tools.alone import alone
from spectrim.tools.threads import inheriting

JOINT = spectrim.Joint(params_kept=0.6, samples=64, refit=64)
TRUNCATION = spectrim.Truncation(ratio=0.5)


class Net(nn.Module):
    """Two layers and a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(16, 24), nn.Linear(24, 8)
        self.norm = nn.BatchNorm1d(24).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)).relu())


def data(count: int = 8) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(16, 16), torch.randint(8, (16,))) for _ in range(count)]


def equal(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


@contextmanager
def served(model: nn.Module) -> Iterator[None]:
    """Run ``model`` on other inputs, in another thread, after each call of its head. The thread must see no error."""
    inside, pool = threading.local(), ThreadPoolExecutor(1)

    def serve() -> None:
        inside.serving = True
        with torch.no_grad():
            model(torch.full((4, 16), 50.0))
        inside.serving = False

    def hook(*_: object) -> None:
        if not getattr(inside, "serving", False):
            pool.submit(serve).result()

    # Global hooks, because the model itself must be the same with and without them.
    handle = nn.modules.module.register_module_forward_pre_hook(lambda own, _: hook() if own is model else None)
    try:
        yield
    finally:
        handle.remove()
        pool.shutdown()


@pytest.mark.parametrize("algorithm", [JOINT, TRUNCATION])
@pytest.mark.parametrize("batch_norm", ["keep", "follow"])
def test_a_model_that_is_served_meanwhile_is_compressed_as_one_that_is_not(algorithm: Any, batch_norm: Any) -> None:
    given = {} if algorithm == JOINT else {"decomposer": spectrim.TwoSidedSVD(samples=64)}
    model, call = Net(), {"calibration": data(), "batch_norm": batch_norm, "algorithm": algorithm, **given}
    expected = spectrim.compress(model, **call)
    with served(model):
        found = spectrim.compress(model, **call)
    assert found.plan == expected.plan and found.notes == expected.notes and equal(found.model, expected.model)


def test_one_model_that_several_threads_compress_at_once_gives_each_the_same() -> None:
    model, start, splits = Net(), threading.Barrier(3), data(40)
    expected = spectrim.compress(model, calibration=splits, algorithm=JOINT).model

    def compressed() -> nn.Module:
        start.wait()
        return spectrim.compress(nn.Sequential(model)[0], calibration=splits, algorithm=JOINT).model

    for _ in range(2):
        with ThreadPoolExecutor(3) as pool:
            found = [pool.submit(compressed) for _ in range(3)]
        assert all(equal(one.result(), expected) for one in found)


class Attending(nn.Module):
    """A layer of torch, which takes another way while MACs are counted."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True).eval()
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attend(x.unflatten(0, (4, -1))).mean(1))


def test_models_that_several_threads_compress_at_once_are_as_one_after_the_other() -> None:
    splits = [(x, y[:4]) for x, y in data()]
    fused = torch.backends.mha.get_fastpath_enabled()

    def compressed(model: nn.Module) -> tuple[nn.Module, float]:
        result = spectrim.compress(model, calibration=splits, algorithm=spectrim.Joint(macs_kept=0.7, refit=32))
        return result.model, result.macs_kept

    # Built here: threads that build models share one state of the random numbers, and the weights would differ.
    models = [Attending() for _ in range(4)]
    model, macs = compressed(models[0])
    with ThreadPoolExecutor(3) as pool:
        found = [pool.submit(compressed, one) for one in models[1:]]
    assert all(equal(one.result()[0], model) and one.result()[1] == macs for one in found)
    assert torch.backends.mha.get_fastpath_enabled() == fused


def test_others_wait_and_a_thread_that_inherits_does_not() -> None:
    entered: list[str] = []

    def enter(name: str) -> None:
        with alone():
            entered.append(name)

    with ThreadPoolExecutor(2) as pool:
        with alone():
            waits = pool.submit(enter, "waits")
            pool.submit(inheriting(lambda: enter("inherits"))).result()
            enter("this one")
            with pytest.raises(TimeoutError):
                waits.result(timeout=0.05)
            assert entered == ["inherits", "this one"]
        waits.result()
    assert entered[-1] == "waits"


def test_a_forked_process_waits_for_no_thread_of_its_parent() -> None:
    inside, done = threading.Event(), threading.Event()

    def hold() -> None:
        with alone():
            inside.set()
            done.wait()

    def enter() -> None:
        with alone():
            pass

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        inside.wait()
        child = multiprocessing.get_context("fork").Process(target=enter, daemon=True)
        child.start()
        child.join(20)
        assert child.exitcode == 0
    finally:
        done.set()
        holder.join()


class Apart(Net):
    """Calls its first layer in a thread of its own, as nn.DataParallel calls them all."""

    pool = ThreadPoolExecutor(1)

    def forward(self, x: Tensor) -> Tensor:
        gradient = torch.is_grad_enabled()

        def run() -> Tensor:
            with torch.set_grad_enabled(gradient):
                return self.body(x)

        return self.head(self.norm(self.pool.submit(run).result()).relu())


@pytest.mark.parametrize("algorithm", [replace(JOINT, params_kept=0.9), TRUNCATION, Refitted(TRUNCATION)], ids=str)
def test_a_layer_that_the_model_calls_in_another_thread_stays_dense(algorithm: Any) -> None:
    result = spectrim.compress(Apart(), calibration=data(), algorithm=algorithm)
    assert list(result.plan) == ["head"] and any(f"body: left dense: {ELSEWHERE}" in note for note in result.notes)
