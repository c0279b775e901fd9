"""Layers in unusual surroundings: inside of torch.func, and while other threads run models."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim
from spectrim.surgery import find_layers


class Mapped(nn.Module):
    """Calls a layer inside of a transform of torch.func."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.outside(torch.vmap(lambda row: self.inside(row).relu())(x))


@pytest.mark.parametrize("algorithm", [spectrim.Truncation(rank=4), spectrim.Joint(params_kept=0.8)], ids=str)
def test_a_layer_that_torch_func_transforms_stays_dense(algorithm: Any) -> None:
    data = [(torch.randn(8, 16), torch.randint(0, 16, (8,)))]
    result = spectrim.compress(Mapped(), calibration=data, algorithm=algorithm)
    assert list(result.plan) == ["outside"] and any("torch.func" in note for note in result.notes)


class Meeting(nn.Module):
    """Waits in its forward pass until as many passes have begun as it is told."""

    def __init__(self, barrier: threading.Barrier) -> None:
        super().__init__()
        self.barriers = (barrier,)
        self.body, self.read = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        with suppress(threading.BrokenBarrierError):
            self.barriers[0].wait(0.2)
        return x @ self.read.weight


def test_models_may_be_looked_at_in_several_threads_at_once() -> None:
    patched, barrier = (nn.Module.__getattr__, nn.Linear.forward), threading.Barrier(2)
    with ThreadPoolExecutor(2) as threads:
        looked = [threads.submit(find_layers.factorable, Meeting(barrier), torch.randn(2, 16)) for _ in range(2)]
    assert [list(one.result()[0]) for one in looked] == [["body"], ["body"]]
    assert (nn.Module.__getattr__, nn.Linear.forward) == patched
