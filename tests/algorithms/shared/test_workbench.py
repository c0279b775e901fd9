"""What a workbench returns: the model that was tried, a trial that shares what is dense, and notes in their order."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectrim.algorithms.shared import workbench
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.batches import evaluating
from spectrim.decomposers.matrix import MatrixSpectrum
from spectrim.decomposers.svd import SVD
from spectrim.statistics.objective import Objective
from spectrim.surgery import latency

KEPT = {"0": 2, "3": 3, "6": 4}


@pytest.fixture
def bench(net: nn.Sequential, objective: Objective) -> Workbench:
    return Workbench.of(net, SVD(), objective)


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with evaluating(model), torch.no_grad():
        return model(x)


def test_the_model_that_is_returned_is_the_one_that_was_tried(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, factored, factor = list[nn.Module](), list[int](), MatrixSpectrum.factor
    monkeypatch.setattr(workbench, "failing_layers", lambda model, *_: tried.append(model) or {})
    monkeypatch.setattr(MatrixSpectrum, "factor", lambda self, keep: factored.append(keep) or factor(self, keep))
    result = bench.finish(KEPT)
    assert [id(model) for model in tried] == [id(result.model)] and sorted(factored) == [2, 3, 4]


def test_a_trial_computes_what_the_result_does_and_shares_what_stays_dense(
    bench: Workbench, net: nn.Sequential
) -> None:
    before = copy.deepcopy(net.state_dict())
    trial, result = bench.trial(KEPT), bench.finish(KEPT)
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(logits(trial, x), logits(result.model, x))
    assert trial[8].weight is net[8].weight is not result.model[8].weight
    assert trial[1].running_mean is not net[1].running_mean  # so that its statistics can be estimated anew
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_notes_of_an_algorithm_follow_those_of_the_workbench(net: nn.Sequential, objective: Objective) -> None:
    def refuses(*ranks: int) -> Any:
        def hook(module: Any, *_: Any) -> None:
            assert getattr(module, "rank", 0) not in ranks, "this hook does not know the rank"

        return hook

    net[6].register_forward_hook(refuses(4))
    net[8].register_forward_hook(refuses(1))
    result = Workbench.of(net, SVD(), objective).finish(KEPT, notes=["own"])
    assert list(result.plan) == ["0", "3"] and torch.equal(result.model[6].weight, net[6].weight)
    assert [note.split(":")[0] for note in result.notes] == ["8", "own", "6"]


def test_timing_leaves_no_trace_in_either_model(objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(nn.Sequential):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    def run(models: Any, example: Any, batch_size: int) -> list[float]:
        return [float(model(example).isnan().any()) + place for place, model in zip((2, 1), models, strict=True)]

    monkeypatch.setattr(latency, "in_turns", run)
    net = Counting(nn.Flatten(), nn.Linear(192, 64), nn.Linear(64, 5))
    bench = Workbench.of(net, SVD(), objective)
    result = workbench.replace(bench, timed_at=2).finish({"1": 4})
    assert "as a whole, measured in turns: 1 ms against 2 ms dense" in result.notes and list(result.plan) == ["1"]
    assert "calls" not in vars(net) and "calls" not in vars(result.model)
