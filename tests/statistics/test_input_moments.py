"""The second moment of a layer's inputs is that of the vectors that its first factor multiplies."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.decomposers.matrix import to_matrix
from spectrim.errors import UserError
from spectrim.factored.dense import DenseLayer
from spectrim.statistics.input_moments import Rows, input_moments
from spectrim.statistics.objective import Objective

CONVOLUTIONS = [
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 0), groups=2),
    nn.Conv2d(4, 6, 3, padding="same", dilation=2, padding_mode="circular"),
]


class Probe(nn.Module):
    """The layer, then a mean: any loss of it has a layer to hook."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).flatten(1)


def objective(*batches: Tensor) -> Objective:
    return Objective(F.cross_entropy, {"calibration": [(x, torch.zeros(len(x)).long()) for x in batches]})


def moment_of(model: Probe, form: str, objective: Objective, samples: int) -> Tensor:
    return input_moments(model, {"layer": [form]}, objective, samples)["layer"][form]


def test_of_a_linear_is_the_mean_over_samples_and_positions() -> None:
    x = torch.randn(6, 5, 7)
    moment = moment_of(Probe(nn.Linear(7, 3)), "linear", objective(x[:4], x[4:]), samples=6)
    flat = x.reshape(-1, 7).double()
    torch.testing.assert_close(moment, (flat.T @ flat / len(flat)).unsqueeze(0))


@pytest.mark.parametrize("layer", CONVOLUTIONS)
def test_of_a_convolution_gives_the_mean_square_of_its_outputs(layer: Any) -> None:
    layer = layer.double()
    x = torch.randn(3, 4, 9, 8).double()
    moment = moment_of(Probe(layer), "channel", objective(x), samples=3)
    W = to_matrix(layer.weight.detach(), DenseLayer.of(layer), "channel")
    outputs = (layer(x) - layer.bias.view(1, -1, 1, 1)).transpose(0, 1).flatten(1)
    torch.testing.assert_close(torch.einsum("goi,gij,goj->go", W, moment, W).flatten(), outputs.square().mean(1))


def test_of_rows_in_the_spatial_form() -> None:
    layer = nn.Conv2d(4, 6, 3, padding=1)
    x = torch.randn(2, 4, 5, 6)
    moment = moment_of(Probe(layer), "spatial", objective(x), samples=2)
    rows = F.unfold(x, (1, 3), padding=(0, 1)).transpose(1, 2).reshape(-1, 12).double()
    torch.testing.assert_close(moment, (rows.T @ rows / len(rows)).unsqueeze(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_rows_of_some_positions_are_those_of_all_at_them(layer: Any) -> None:
    x = torch.randn(5, 4, 6, 6, dtype=torch.float64)
    y = layer.double()(x).detach()
    rows, size = Rows(layer, "channel"), y[:, 0].shape
    chosen = torch.randperm(size.numel())[:40]
    at = torch.unravel_index(chosen, size)
    assert rows.inputs(x, at=at).equal(rows.inputs(x)[:, chosen])
    assert rows.outputs(y, at=at).equal(rows.outputs(y)[:, chosen])


def test_several_forms_of_a_layer_are_gathered_in_one_pass() -> None:
    model, once = Probe(nn.Conv2d(4, 6, 3, padding=1)), objective(torch.randn(2, 4, 5, 6))
    both = input_moments(model, {"layer": ("channel", "spatial")}, once, samples=2)["layer"]
    assert list(both) == ["channel", "spatial"]
    for form, moment in both.items():
        assert moment.equal(moment_of(model, form, once, samples=2))


def test_stops_at_the_samples_asked_for_and_leaves_the_model_as_it_was() -> None:
    model = Probe(nn.Linear(2, 2)).train()
    first, second = torch.ones(2, 2), torch.full((2, 2), 100.0)
    moment = moment_of(model, "linear", objective(first, second), samples=2)
    assert moment.equal(torch.ones(1, 2, 2).double())
    assert model.training
    assert not model.layer._forward_pre_hooks


def test_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="calibration split is empty"):
        moment_of(Probe(nn.Linear(2, 2)), "linear", objective(), samples=2)


class Heads(nn.Module):
    """Linear layers that read one tensor, but for what ``between`` does to it from the third batch on."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.q, self.k, self.v, self.gate = nn.Linear(7, 7), nn.Linear(7, 3), nn.Linear(7, 3), nn.Linear(7, 3)
        self.between, self.calls = between, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = x + 0
        q, k = self.q(x), self.k(x)
        if self.calls > 2 and self.between == "changed in place":
            x.mul_(2)
        elif self.calls > 2 and self.between == "another part":
            x = x[1:]
        elif self.calls > 2 and self.between == "other strides":
            x = x.transpose(0, 1)
        v = 0 if self.calls > 2 and self.between == "not called" else self.v(x).sum()
        return q.flatten(1) + self.gate(q).mean() + k.mean() + v


@pytest.mark.parametrize("between", ["nothing", "changed in place", "another part", "other strides", "not called"])
def test_layers_that_read_the_same_tensors_have_one_moment_and_others_their_own(between: str) -> None:
    batches, names = [torch.randn(4, 5, 7) for _ in range(4)], ["q", "k", "v", "gate"]

    def moments(names: list[str]) -> dict[str, Any]:
        found = input_moments(Heads(between), {name: ["linear"] for name in names}, objective(*batches), 100)
        return {name: own.parts["linear"] for name, own in found.items()}

    torch.manual_seed(0)
    together = moments(names)
    for name in names:
        torch.manual_seed(0)
        assert together[name].equal(moments([name])[name])
    assert together["k"] is together["q"] and together["gate"] is not together["q"]
    assert (together["v"] is together["q"]) == (between == "nothing")


@pytest.mark.parametrize("kept", [[6, 3, 1], [6, 6, 6]])
def test_a_mask_that_is_added_to_scores_leaves_out_what_one_of_ones_and_zeros_does(kept: list[int]) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.layer(x)

    x, model = torch.randn(3, 6, 8), Masked()
    mask = torch.arange(6) < torch.tensor(kept).unsqueeze(1)
    expected = x[mask].double().T @ x[mask].double() / mask.sum()
    for given in (mask, mask.long(), mask.float(), torch.zeros(3, 6).masked_fill(~mask, float("-inf"))):
        data = [({"x": x, "attention_mask": given}, None)]
        found = input_moments(model, {"layer": ["linear"]}, Objective(F.cross_entropy, {"calibration": data}), 3)
        torch.testing.assert_close(found["layer"]["linear"][0], expected, rtol=1e-5, atol=1e-6)
