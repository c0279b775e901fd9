"""A model that switches gradients off in its forward pass is told so, and compressed by what needs none."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spectrim
from spectrim.algorithms.refitted import Refitted
from spectrim.errors import UserError

Off = Callable[[], AbstractContextManager[Any]]
OFF: list[Off] = [torch.no_grad, torch.inference_mode]


class Switching(nn.Module):
    """A net whose whole pass, or whose first layer alone, runs without gradients; with None all has gradients."""

    def __init__(self, off: Off | None, whole: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.off, self.whole = off, whole
        self.first, self.second, self.third = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.off is None:
            return self.rest(self.start(x))
        with self.off():
            y = self.start(x)
            if self.whole:
                return self.rest(y)
        return self.rest(y.clone())

    def start(self, x: Tensor) -> Tensor:
        return F.relu(self.first(x))

    def rest(self, x: Tensor) -> Tensor:
        return self.third(F.relu(self.second(x)))


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(16, 8), torch.randint(4, (16,))) for _ in range(3)]


@pytest.mark.parametrize("off", OFF)
@pytest.mark.parametrize(
    ("algorithm", "size"),
    [("knapsack", 0.7), (Refitted(spectrim.Truncation(ratio=0.5), samples=48), None)],
    ids=["knapsack", "refitted"],
)
def test_what_needs_no_gradient_compresses_it_as_its_twin(off: Off, algorithm: Any, size: float | None) -> None:
    data, x = batches(), torch.randn(5, 8)
    found, expected = (
        spectrim.compress(Switching(own).eval(), calibration=data, algorithm=algorithm, params_kept=size)
        for own in (off, None)
    )
    assert found.plan == expected.plan
    assert torch.equal(found.model(x), expected.model(x))
    assert found.report["predicted_change"].isna().all()
    with pytest.raises(UserError, match="switches gradients off"):
        _ = found.predicted_change


@pytest.mark.parametrize("off", OFF)
@pytest.mark.parametrize(
    "algorithm",
    [spectrim.Joint(params_kept=0.7), spectrim.Lossless(), Refitted(spectrim.Truncation(ratio=0.5), refit_by="loss")],
    ids=["joint", "lossless", "refitted by the loss"],
)
def test_what_needs_one_says_who_switched_it_off(off: Off, algorithm: Any) -> None:
    with pytest.raises(UserError, match=r"^[^\n]*(switches gradients off|gradients switched off)[^\n]*knapsack$"):
        spectrim.compress(Switching(off).eval(), calibration=batches(), algorithm=algorithm)


@pytest.mark.parametrize("off", OFF)
def test_a_layer_that_alone_runs_without_gradients_stays_dense_with_the_reason(off: Off) -> None:
    result = spectrim.compress(
        Switching(off, whole=False).eval(), calibration=batches(), algorithm=spectrim.Joint(params_kept=0.8, refit=0)
    )
    assert result.plan.keys() <= {"second", "third"} and result.params_kept <= 0.8
    assert any(note.startswith("first: left dense: the model calls it with gradients") for note in result.notes)


@pytest.mark.parametrize("off", OFF)
def test_no_change_is_predicted_where_such_a_layer_is_factored(off: Off) -> None:
    """The gradient does not reach it, so that its part of the change is not zero but unknown."""
    model, data = Switching(off, whole=False).eval(), batches()
    result = spectrim.compress(model, calibration=data, algorithm=spectrim.Truncation(ratio=0.5))
    assert "first" in result.plan and result.report["predicted_change"].isna().all()
    with pytest.raises(UserError, match="^first: the model calls it with gradients switched off"):
        _ = result.predicted_change
    others = spectrim.compress(model, calibration=data, algorithm=spectrim.Truncation(ratio=0.5), exclude=["first"])
    assert others.predicted_change != 0
    notes = spectrim.compress(model, calibration=data, algorithm=spectrim.Lossless()).notes
    assert any(note.startswith("first: left dense: the model calls it with gradients switched off") for note in notes)


def test_a_tensor_of_inference_mode_on_the_way_of_a_gradient_is_named_as_such() -> None:
    class Mixed(Switching):
        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode():
                y = self.start(x)
            return self.rest(y)

    with pytest.raises(UserError, match=r"at layer second: .*; give torch.no_grad in place of torch.inference_mode"):
        spectrim.compress(Mixed(None).eval(), calibration=batches(), algorithm=spectrim.Lossless())
