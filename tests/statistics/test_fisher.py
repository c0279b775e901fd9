"""Gate gradients are the derivatives that they claim to be, a sample at a time."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.decomposers.svd import SVD
from spectrim.errors import UserError
from spectrim.factored.forms import PlainForm
from spectrim.factored.plan import Kept, RankPlan
from spectrim.statistics.fisher import gate_gradients
from spectrim.statistics.gate_rows import GateRows
from spectrim.statistics.objective import Objective
from spectrim.surgery import replacing


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.norm(self.conv(x))).mean((2, 3)))


def factored(net: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    spectra = {name: SVD("spatial").spectrum(net.get_submodule(name)) for name in ("conv", "fc")}
    plan = RankPlan.of({name: spectrum.kept(spectrum.max_rank) for name, spectrum in spectra.items()})
    return replacing.apply(net, plan, spectra), spectra


def batches(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(3, 4, 5, 5), torch.randint(0, 3, (3,))) for _ in range(count // 3)]


def test_mean_is_the_first_order_change_of_dropping_one_component() -> None:
    net = Net().eval()
    model, spectra = factored(net)
    objective = Objective(F.cross_entropy, {"calibration": batches()})
    rows = gate_gradients(model, ["conv", "fc"], objective, samples=6).rows
    weights = objective.gradients(net, ["conv", "fc"])
    for name, spectrum in spectra.items():
        components = -spectrum.first_order(weights[name]).diff()  # of the curve over ranks
        torch.testing.assert_close(-rows[name].given.mean(0).double(), components, atol=1e-6, rtol=1e-4)


def test_a_layer_that_is_called_again_and_again_has_one_gate_for_all_calls() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = torch.tanh(self.step(x))
            return self.head(x)

    net, data = Recurrent(), Objective(F.cross_entropy, {"calibration": [(torch.randn(6, 4), torch.arange(6) % 3)]})
    spectra: Any = {"step": SVD().spectrum(net.step)}
    model = replacing.apply(net, RankPlan.of({"step": Kept(4, PlainForm("linear"))}), spectra)
    given = gate_gradients(model, ["step"], data, samples=6).rows["step"].given
    components = spectra["step"].first_order(data.gradients(net, ["step"])["step"]).diff()
    torch.testing.assert_close(given.mean(0).double(), components, atol=1e-6, rtol=1e-4)


def test_rows_are_those_of_each_sample_alone() -> None:
    model, _ = factored(Net().eval())
    data = batches()
    together = gate_gradients(model, ["conv", "fc"], Objective(F.cross_entropy, {"calibration": data}), samples=6).rows
    alone = [(x[i : i + 1], y[i : i + 1]) for x, y in data for i in range(len(y))]
    apart = gate_gradients(model, ["conv", "fc"], Objective(F.cross_entropy, {"calibration": alone}), samples=6).rows
    for name in together:
        torch.testing.assert_close(together[name].given, apart[name].given, atol=1e-6, rtol=1e-4)


def test_gates_in_blocks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = factored(Net().eval())
    splits, names, flow_back = {"calibration": batches()}, ["conv", "fc"], GateRows._flow_back
    whole = gate_gradients(model, names, Objective(F.cross_entropy, splits), samples=6).rows
    held = []

    def watched(gates: GateRows, calls: list, starts: list, keep: bool) -> None:
        held.extend([len(calls)] if calls else [])
        flow_back(gates, calls, starts, keep)

    monkeypatch.setattr(GateRows, "_flow_back", watched)
    apart = gate_gradients(model, names, Objective(F.cross_entropy, splits, layers_at_once=1), samples=6).rows
    assert held == [1] * (2 * 3 * 2)  # batches; given targets, drawn directions and the check of the rows; layers
    for name in names:
        assert apart[name].given.equal(whole[name].given) and apart[name].fisher.equal(whole[name].fisher)


def test_drawn_directions_give_the_fisher_information_and_are_seeded() -> None:
    """Against the sum over all classes by their probability."""
    model, _ = factored(Net().eval())
    x = torch.randn(1, 4, 5, 5)
    many = Objective(F.cross_entropy, {"calibration": [(x.expand(4000, -1, -1, -1), torch.zeros(4000).long())]})
    rows = gate_gradients(model, ["conv", "fc"], many, samples=4000, seed=1).rows
    p = model(x).detach().softmax(1)[0]
    exact = 0
    for label, weight in enumerate(p):
        one = Objective(F.cross_entropy, {"calibration": [(x, torch.tensor([label]))]})
        own = gate_gradients(model, ["conv", "fc"], one, samples=1).rows
        J = torch.cat([own[name].given for name in ("conv", "fc")], 1)
        exact = exact + weight * J.T @ J
    J = torch.cat([rows[name].fisher for name in ("conv", "fc")], 1)
    found = J.T @ J / 4000
    assert float((found - exact).norm() / exact.norm()) < 0.1
    again = gate_gradients(model, ["fc"], many, samples=4000, seed=1).rows["fc"]
    assert again.fisher.equal(rows["fc"].fisher)


def test_without_the_first_order_one_backward_pass_less_gives_the_same_directions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _ = factored(Net().eval())
    passes, grad, data = [], torch.autograd.grad, Objective(F.cross_entropy, {"calibration": batches()})
    monkeypatch.setattr(torch.autograd, "grad", lambda *given, **how: passes.append(1) or grad(*given, **how))
    both = gate_gradients(model, ["conv", "fc"], data, samples=6).rows
    assert len(passes) == 2 * 3  # batches; given targets, drawn directions and the check whose rows they are
    alone = gate_gradients(model, ["conv", "fc"], data, samples=6, first_order=False).rows
    assert len(passes) == 2 * 3 + 2 * 2
    for name, own in alone.items():
        assert own.fisher.equal(both[name].fisher) and own.given.shape == (0, own.fisher.shape[1])


def test_a_loss_without_classes_takes_the_given_targets() -> None:
    model, _ = factored(Net().eval())
    data = [(x, torch.randn(3, 3)) for x, _ in batches()]
    rows = gate_gradients(model, ["fc"], Objective(F.mse_loss, {"calibration": data}), samples=6).rows["fc"]
    assert rows.fisher.equal(rows.given)
    alone = gate_gradients(
        model, ["fc"], Objective(F.mse_loss, {"calibration": data}), samples=6, first_order=False
    ).rows
    assert alone["fc"].fisher.equal(rows.fisher) and not len(alone["fc"].given)


def test_frozen_models_positions_and_the_number_of_samples() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).mean(1)

    net = Tokens()
    spectra: Any = {"layer": SVD().spectrum(net.layer)}
    model = replacing.apply(net, RankPlan.of({"layer": Kept(3, PlainForm("linear"))}), spectra).requires_grad_(False)
    data = [(torch.randn(2, 7, 4), torch.tensor([0, 1])) for _ in range(5)]
    rows = gate_gradients(model, ["layer"], Objective(F.cross_entropy, {"calibration": data}), samples=3).rows["layer"]
    assert rows.given.shape == rows.fisher.shape == (4, 3)  # whole batches
    assert not model.layer.first._forward_hooks


def test_bad_input_is_one_line() -> None:
    model, _ = factored(Net().eval())
    with pytest.raises(UserError, match="calibration split is empty"):
        gate_gradients(model, ["fc"], Objective(F.cross_entropy, {"calibration": []}), samples=6)
