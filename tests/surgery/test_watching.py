"""Layers in unusual surroundings: inside of torch.func, and while other threads run models."""

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim
from spectrim.errors import UserError
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


class Writes(nn.Module):
    """Changes its weights in each pass, or in the first one alone."""

    def __init__(self, write: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.scaled, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.write(self.scaled, self.scaled.weight)
        return self.head(self.scaled(self.body(x)))


def normalised(layer: Any, weight: Tensor) -> None:
    layer.weight.data = weight / weight.norm(dim=1, keepdim=True)


WRITES: dict[str, Callable[[Any, Tensor], Any]] = {
    "in place": lambda _, weight: weight.mul_(2),
    "by an operator": lambda _, weight: weight.__imul__(2),
    "by its data": lambda _, weight: weight.data.div_(2),
    "a row": lambda _, weight: weight.__setitem__(0, 3),
    "as an output": lambda _, weight: torch.mul(weight, 2, out=weight),
    "new data": normalised,
}


@pytest.mark.parametrize("how", WRITES)
def test_a_forward_pass_that_writes_to_a_weight_is_refused_before_it_has(how: str) -> None:
    model, x = Writes(WRITES[how]), torch.randn(4, 8)
    before = copy.deepcopy(model.state_dict())
    places = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(UserError, match="forward pass of the model writes to its parameter scaled.weight"):
        spectrim.compress(model, calibration=[x], algorithm=spectrim.Truncation(rank=1))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert places == [p.data_ptr() for p in model.parameters()]


def test_what_a_first_pass_has_written_is_no_change_any_more() -> None:
    model, x = Writes(normalised), torch.randn(4, 8)
    model(x)
    result = spectrim.compress(model, calibration=[x], algorithm=spectrim.Truncation(rank=1))
    assert set(result.plan) == {"body", "head"}


def test_flags_and_renormalised_rows_are_no_writing() -> None:
    model = nn.Sequential(nn.Embedding(9, 8, max_norm=1.0), Writes(lambda layer, _: layer.requires_grad_(False)))
    assert spectrim.compress(model, calibration=[torch.arange(9)], algorithm=spectrim.Truncation(rank=1)).plan
