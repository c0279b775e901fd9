"""The agent finds what chance does not, in the same number of evaluations, and goes on after a kill as if unbroken."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.algorithms.related import reinforced
from spectrim.algorithms.related.reinforced import Agent, Reinforced, states_of
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.svd import SVD
from spectrim.decomposers.tucker2 import Tucker2
from spectrim.errors import UserError
from spectrim.statistics.objective import Evaluation, Objective

AT_RANDOM = 10**6  # a batch that is never full: the agent learns nothing


class Branches(nn.Module):
    """Layers side by side, which all matter: every other one needs all its rank, the others have rank 1."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(8))
        for i, layer in enumerate(self.branches):
            U, _, Vh = torch.linalg.svd(torch.randn(16, 16))
            with torch.no_grad():
                layer.weight.copy_(4 * U[:, :1] @ Vh[:1] if i % 2 else U @ Vh)  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(part) for layer, part in zip(self.branches, x.chunk(8, 1), strict=True)]).sum(0)


def test_the_agent_beats_random_ratios_in_as_many_evaluations() -> None:
    net, x = Branches(), torch.randn(256, 128)
    objective = Objective(F.cross_entropy, {"calibration": [(x, net(x).argmax(1).detach())]})
    found = {}
    for batch in (10, AT_RANDOM):
        chosen = Reinforced(params_kept=0.6, evaluations=100, batch=batch)
        found[batch] = chosen.compress(net, SVD(), objective)
        assert len(found[batch].log) == 100
    learnt, drawn = (max(entry["reward"] for entry in result.log) for result in found.values())
    assert learnt > drawn + 0.05
    accuracy = objective.evaluate(found[10].model).accuracy
    assert accuracy is not None and accuracy == learnt  # the best net is the one that is returned
    ranks = list(max(found[10].log, key=lambda entry: entry["reward"])["ranks"].values())
    assert sum(ranks[0::2]) > 2 * sum(ranks[1::2])


def test_an_agent_moves_towards_what_was_rewarded() -> None:
    wanted = torch.tensor([0.1, 0.9] * 6)
    agent = Agent(torch.eye(12), lr=0.2, seed=0)
    assert torch.equal(agent.policy().mean, torch.zeros(12))
    for _ in range(30):
        actions = torch.stack([agent.act() for _ in range(10)])
        agent.learn(actions, [-float((action.sigmoid() - wanted).square().sum()) for action in actions])
    with torch.no_grad():
        policy = agent.policy()
    assert float((policy.mean.sigmoid() - wanted).abs().max()) < 0.15 and float(policy.stddev[0]) < 1


def test_states_tell_the_layers_apart(net: nn.Module, objective: Objective) -> None:
    states = states_of(Workbench.of(net, SVD(), objective))
    assert states.shape == (4, 3 + 4) and torch.equal(states[:, 3:], torch.eye(4))
    assert float(states[:, :3].mean(0).abs().max()) < 1e-6


@pytest.mark.parametrize("decomposer", [SVD("spatial"), Tucker2()], ids=lambda one: type(one).__name__)
def test_a_budget_is_met_from_below_at_every_evaluation(net: nn.Module, objective: Objective, decomposer: Any) -> None:
    result = Reinforced(params_kept=0.5, evaluations=12, batch=4).compress(net, decomposer, objective)
    assert all(0.3 < entry["params_kept"] <= 0.5 for entry in result.log)
    assert result.params_kept == pytest.approx(max(result.log, key=lambda entry: entry["reward"])["params_kept"])
    assert all(entry["reward"] == entry["accuracy"] for entry in result.log)


def test_without_a_budget_parameters_are_paid_for(net: nn.Module, objective: Objective) -> None:
    result = Reinforced(strength=0.5, evaluations=12, batch=4).compress(net, SVD(), objective)
    for entry in result.log:
        assert entry["reward"] == pytest.approx(entry["accuracy"] - 0.5 * entry["params_kept"])
    dear = Reinforced(strength=100.0, evaluations=60, lr=0.5).compress(net, SVD(), objective)
    assert dear.params_kept < min(result.params_kept, 0.2)


def test_where_there_is_no_accuracy_the_loss_is_the_reward(net: nn.Module, batches: Any) -> None:
    objective = Objective(
        lambda outputs, targets: outputs.square().mean(), {"calibration": [(batches[0][0], [0] * 16)]}
    )
    result = Reinforced(strength=0.0, evaluations=5, batch=2).compress(net, SVD(), objective)
    assert all(entry["reward"] == -entry["loss"] and entry["accuracy"] is None for entry in result.log)


class Interrupted(Exception):
    """Stands for a kill."""


def test_an_interrupted_search_goes_on_to_the_same_end_and_measures_nothing_twice(
    net: nn.Module, objective: Objective, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = Reinforced(params_kept=0.5, evaluations=20, batch=4, state=str(tmp_path / "state.safetensors"))
    unbroken = replace(chosen, state=None).compress(net, SVD(), objective)
    usual, calls = reinforced._measure, 0

    def counted(*given: Any) -> tuple[float, float]:
        nonlocal calls
        calls += 1
        if calls == 10:
            raise Interrupted
        return usual(*given)

    monkeypatch.setattr(reinforced, "_measure", counted)
    with pytest.raises(Interrupted):
        chosen.compress(net, SVD(), objective)
    resumed: Compressed = chosen.compress(net, SVD(), objective)
    assert calls == 10 + 11 and resumed.log == unbroken.log and resumed.plan == unbroken.plan
    longer = replace(chosen, evaluations=22).compress(net, SVD(), objective)
    assert calls == 10 + 11 + 2 and longer.log[:20] == unbroken.log


def test_the_state_of_another_search_is_refused(net: nn.Module, objective: Objective, tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    chosen = Reinforced(evaluations=2, state=str(state))
    chosen.compress(net, SVD(), objective)
    for other, decomposer in ((replace(chosen, seed=1), SVD()), (chosen, SVD("spatial"))):
        with pytest.raises(UserError, match="belongs to a training or search with other settings"):
            other.compress(net, decomposer, objective)
    with torch.no_grad():
        net[6].weight[0, 0] += 1  # type: ignore[index]
    with pytest.raises(UserError, match="belongs to a training or search with other settings"):
        chosen.compress(net, SVD(), objective)
    state.write_bytes(state.read_bytes()[:20])
    with pytest.raises(UserError, match="is truncated"):
        chosen.compress(net, SVD(), objective)


def test_a_loss_that_breaks_is_one_line(net: nn.Module, objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Evaluation:
        raise UserError("the loss on the calibration split is nan")

    monkeypatch.setattr(Objective, "evaluate", broken)
    with pytest.raises(UserError, match="calibration split is nan"):
        Reinforced(evaluations=2).compress(net, SVD(), objective)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"evaluations": 0}, "expected evaluations >= 1"),
        ({"batch": 1}, "batch >= 2"),
        ({"strength": -1.0}, "expected strength >= 0"),
        ({"lr": math.inf}, "lr > 0, both finite"),
        ({"params_kept": 1.0}, r"params_kept must lie in \(0, 1\)"),
        ({"subset": 0}, "subset must be at least 1"),
        ({"evaluations": 1.5}, "is not of type int"),
    ],
)
def test_settings_that_cannot_work_are_one_line(bad: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Reinforced(**bad)


def test_what_it_cannot_work_with_is_one_line(net: nn.Module, objective: Objective) -> None:
    with pytest.raises(UserError, match="params_kept=0.01 is out of reach"):
        Reinforced(params_kept=0.01).compress(net, SVD(), objective)
    with pytest.raises(UserError, match="subset=999 is more than the"):
        Reinforced(subset=999).compress(net, SVD(), objective)
