"""A loss that reads layers of the given model is refused, and one that holds anything else is not."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spectrim
from spectrim.errors import UserError
from spectrim.statistics.loss_apart import require_apart
from spectrim.statistics.objective import Objective

ALGORITHMS = spectrim.Joint(max_loss_increase=0.01, refit=0), spectrim.Lossless(), spectrim.Truncation(ratio=0.5)


class Net(nn.Module):
    """A net with a head and a temperature that its loss alone uses, and attention, which is unpacked."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head, self.temperature, self.criterion = nn.Linear(8, 8), nn.Parameter(torch.ones(())), nn.MSELoss()

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x).unsqueeze(1)
        return self.attention(y, y, y)[0].squeeze(1)


def points() -> Tensor:
    return torch.linspace(-1, 1, 8 * 5).view(5, 8)


READING: dict[str, Callable[[nn.Module], Any]] = {
    "a residual": lambda model: model(points()).square().mean(),
    "a pass without gradient": lambda model: model(points()).detach().square().mean(),
    "a part": lambda model: model.body[0](points()).square().mean(),
    "the method": lambda model: model.body.forward(points()).square().mean(),
    "all weights": lambda model: sum(p.square().sum() for p in model.parameters()),
    "one weight": lambda model: model.attention.in_proj_weight.square().sum(),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("term", READING.values(), ids=READING)
def test_a_loss_that_reads_the_given_model_is_refused_by_every_algorithm(term: Any, frozen: bool) -> None:
    model = Net().eval().requires_grad_(not frozen)
    data = [(torch.randn(16, 8), torch.randn(16, 8)) for _ in range(3)]
    for algorithm in ALGORITHMS:
        for dry_run in (False, True):
            with pytest.raises(UserError, match=r"^the loss reads \S+ of the given model, [^\n]*$"):
                spectrim.compress(
                    model,
                    calibration=data,
                    verification=data,
                    loss=lambda out, t: F.mse_loss(out, t) + term(model),
                    algorithm=algorithm,
                    dry_run=dry_run,
                )


class Holding(nn.Module):
    """A loss with a temperature of its own that holds ``model`` and does not use it. It counts its calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.scale = model, nn.Parameter(torch.ones(()))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return F.mse_loss(outputs * self.scale, targets)


def of_teacher(model: nn.Module) -> Any:
    teacher = copy.deepcopy(model)
    return lambda outputs, targets: F.mse_loss(outputs, teacher(targets))


APART: dict[str, Callable[[Any], Any]] = {
    "parameters of its own": Holding,
    "a teacher": of_teacher,
    "a head that the model does not call": lambda model: lambda out, t: F.mse_loss(model.head(out), t),
    "a temperature of the model": lambda model: lambda out, t: F.mse_loss(out * model.temperature, t),
    "a criterion in the model": lambda model: model.criterion,
    "the device of the model": lambda model: lambda out, t: F.mse_loss(out, t.to(next(model.parameters()))),
    "the labels alone": lambda model: lambda out, t: F.mse_loss(out[0], t[0]),
}


@pytest.mark.parametrize("made", APART.values(), ids=APART)
def test_a_loss_that_reads_what_no_cut_changes_is_taken(made: Any) -> None:
    model = Net().eval()
    data = [(torch.randn(16, 8), torch.randn(16, 8)) for _ in range(3)]
    result = spectrim.compress(model, calibration=data, loss=made(model), algorithm=spectrim.Truncation(ratio=0.5))
    assert result.params_kept < 1 and result.report["predicted_change"].notna().all()


def test_it_is_evaluated_once_and_leaves_nothing_changed() -> None:
    model, seen = Net().train(), list[Tensor]()
    loss = Holding(model)
    data = [(torch.randn(16, 8), torch.randn(16, 8))]
    objective = Objective(loss, {"calibration": data})
    hook = loss.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    state = torch.get_rng_state()
    require_apart(model, ["body.0", "body.2"], objective)
    assert len(seen) == 1 and seen[0].grad_fn is None
    assert torch.equal(state, torch.get_rng_state()) and not objective.read
    assert model.training and loss.calls == 0
    assert all(p.requires_grad and p.grad is None for p in [*model.parameters(), *loss.parameters()])
    assert not any(module._forward_pre_hooks for module in model.modules())
    hook.remove()


def test_a_layer_that_stays_dense_may_be_read() -> None:
    model = Net().eval()
    data = [(torch.randn(16, 8), torch.randn(16, 8)) for _ in range(2)]
    result = spectrim.compress(
        model,
        calibration=data,
        loss=lambda out, t: F.mse_loss(model.body[2].weight @ out.T, t.T),
        algorithm=spectrim.Truncation(ratio=0.5),
        exclude=["body.2"],
    )
    assert "body.2" not in result.plan and result.params_kept < 1


def test_a_loss_that_fails_on_the_first_batch_is_left_to_whoever_needs_it() -> None:
    model = Net().eval()

    def failing(outputs: Tensor, targets: Any) -> Tensor:
        raise KeyError("no such label")

    result = spectrim.compress(
        model, calibration=[(torch.randn(16, 8), None)], loss=failing, algorithm=spectrim.Truncation(ratio=0.5)
    )
    assert result.params_kept < 1
