"""The second moments of gradients at outputs, against gradients taken directly, and the loss that they predict."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.decomposers.spectrum import Directions
from spectrim.errors import UserError
from spectrim.factored.layers import FactoredConv2d
from spectrim.losses import TokenLoss
from spectrim.statistics.input_moments import input_moments
from spectrim.statistics.objective import Objective
from spectrim.statistics.output_moments import output_moments

LABELS = Directions(labels=True)


class InPlace(nn.Module):
    """The layer, an activation that works in place, and a head."""

    def __init__(self, layer: nn.Module, features: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(features, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.layer(x), inplace=True).flatten(1))


def moment_of(model: nn.Module, view: str, objective: Objective, directions: Directions = LABELS) -> Tensor:
    return output_moments(model, {"layer": [view]}, objective, 100, directions)["layer"][view]


def objective_of(x: Tensor, classes: int = 4) -> Objective:
    return Objective(F.cross_entropy, {"calibration": [(x, torch.arange(len(x)) % classes)]})


def gradient_at(model: nn.Module, x: Tensor) -> Tensor:
    """The gradient of the summed loss by the output of ``layer``, taken through the rest of the model."""
    y = model.layer(x).detach().requires_grad_(True)  # type: ignore[operator]
    loss = F.cross_entropy(model.head(F.relu(y).flatten(1)), torch.arange(len(x)) % 4, reduction="sum")  # type: ignore[operator]
    return torch.autograd.grad(loss, y)[0]


def test_of_a_linear_with_labels_is_that_of_gradients_taken_by_hand() -> None:
    model, x = InPlace(nn.Linear(5, 6), 6), torch.randn(9, 5)
    g = gradient_at(model, x).double()
    torch.testing.assert_close(moment_of(model, "linear", objective_of(x)), (g.T @ g / 9).unsqueeze(0))
    assert model.layer.weight.grad is None and model.layer.weight.requires_grad


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 0), groups=2),
        nn.Conv2d(4, 6, (4, 3), padding="same", dilation=(2, 1)),
    ],
    ids=str,
)
def test_of_the_spatial_view_is_that_between_the_two_convolutions(layer: nn.Conv2d) -> None:
    x = torch.randn(3, 4, 9, 8)
    model = InPlace(layer, layer(x)[0].numel())
    g = gradient_at(model, x)
    # The second convolution at full rank: each channel between the two is one output shifted by one tap.
    taps, outputs = layer.kernel_size[0], 6 // layer.groups
    pair = FactoredConv2d.shaped_like(layer, outputs * taps, "spatial")
    between = pair.first(x).detach()
    kernel = torch.eye(outputs * taps).view(outputs, taps, outputs * taps).transpose(1, 2).unsqueeze(-1)
    with torch.no_grad():
        pair.second.weight.copy_(kernel.repeat(layer.groups, 1, 1, 1))
        pair.second.bias.zero_()  # type: ignore[union-attr]
    back = torch.autograd.functional.vjp(pair.second, between, g)[1]
    rows = back.transpose(0, 1).reshape(layer.groups, outputs * taps, -1).double()
    torch.testing.assert_close(moment_of(model, "spatial", objective_of(x)), rows @ rows.mT / 3, rtol=1e-4, atol=1e-7)


def test_random_directions_have_the_fisher_information_as_moment_without_labels() -> None:
    model, x = InPlace(nn.Linear(3, 4), 4).double(), torch.randn(1, 3).double()
    y = model.layer(x).detach()
    J = torch.autograd.functional.jacobian(lambda own: model.head(F.relu(own)), y).squeeze()
    p = model(x).softmax(-1).squeeze().detach()
    expected = J.T @ (p.diag() - torch.outer(p, p)) @ J
    many = Objective(F.cross_entropy, {"calibration": [(x.expand(4000, -1), torch.zeros(4000).long())]})
    found = output_moments(model, {"layer": ["linear"]}, many, 4000, Directions())["layer"]["linear"][0]
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.05 * float(expected.abs().max()))
    other = Objective(F.cross_entropy, {"calibration": [(x.expand(4000, -1), torch.ones(4000).long())]})
    again = output_moments(model, {"layer": ["linear"]}, other, 4000, Directions())["layer"]["linear"][0]
    assert again.equal(found)  # of no label


def test_only_the_highest_scores_count_where_top_says_so() -> None:
    model, x = InPlace(nn.Linear(3, 4), 4).double(), torch.randn(1, 3).double()
    best = model(x).topk(2).indices.squeeze()
    y = model.layer(x).detach()
    J = torch.autograd.functional.jacobian(lambda own: model.head(F.relu(own)), y).squeeze()[best]
    p = model(x).squeeze().detach()[best].softmax(-1)
    expected = J.T @ (p.diag() - torch.outer(p, p)) @ J
    many = Objective(F.cross_entropy, {"calibration": [(x.expand(4000, -1), torch.zeros(4000).long())]})
    found = moment_of(model, "linear", many, Directions(top=2))
    assert moment_of(model, "linear", objective_of(x), Directions(top=9)).shape == (1, 4, 4)  # more than there are
    found = output_moments(model, {"layer": ["linear"]}, many, 4000, Directions(top=2))["layer"]["linear"][0]
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.05 * float(expected.abs().max()))


def test_the_two_moments_predict_the_loss_of_a_small_change() -> None:
    model, x = InPlace(nn.Linear(5, 6), 6).double(), torch.randn(400, 5).double()
    data = Objective(F.cross_entropy, {"calibration": [(x, model(x).argmax(1))]})
    C = input_moments(model, {"layer": ["linear"]}, data, 400)["layer"]["linear"][0]
    G = output_moments(model, {"layer": ["linear"]}, data, 400, Directions())["layer"]["linear"][0]
    change, before = 1e-2 * torch.randn(6, 5).double(), model(x).detach()
    with torch.no_grad():
        model.layer.weight += change
    kl = F.kl_div(model(x).log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="batchmean")
    assert float(torch.trace(G @ change @ C @ change.T) / 2) == pytest.approx(float(kl.detach()), rel=0.5)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer, self.unused = nn.Embedding(7, 5), nn.Linear(5, 7), nn.Linear(5, 5)

    def forward(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            self.unused(self.embedding(ids))
        return self.layer(self.embedding(ids))


def test_of_a_language_model_is_the_mean_over_predicted_tokens_and_zero_where_the_loss_does_not_look() -> None:
    model, ids = Tokens(), torch.randint(0, 7, (3, 6))
    targets = ids.clone()
    targets[1, 4:] = -100
    data = Objective(TokenLoss(), {"calibration": [(ids, targets)]})
    found = output_moments(model, {"layer": ["linear"], "unused": ["linear"]}, data, 3, LABELS)
    y = model(ids).detach().requires_grad_(True)
    count = TokenLoss().count(targets)
    (g,) = torch.autograd.grad(TokenLoss()(y, targets) * count, y)
    g = g.reshape(-1, 7).double()
    torch.testing.assert_close(found["layer"]["linear"], (g.T @ g / count).unsqueeze(0), rtol=1e-4, atol=1e-7)
    assert found["unused"]["linear"].equal(torch.zeros(1, 5, 5).double())


def test_outputs_that_are_no_scores_take_the_gradient_of_the_loss() -> None:
    model: Any = InPlace(nn.Linear(5, 6), 6)
    data = Objective(F.mse_loss, {"calibration": [(torch.randn(8, 5), torch.randn(8, 4))]})
    assert moment_of(model, "linear", data, Directions()).equal(moment_of(model, "linear", data, LABELS))


def test_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="calibration split is empty"):
        moment_of(InPlace(nn.Linear(2, 2), 2), "linear", Objective(F.cross_entropy, {"calibration": []}))


def test_inputs_that_require_a_gradient_change_nothing() -> None:
    model, x = InPlace(nn.Linear(5, 6), 6), torch.randn(9, 5)
    found = moment_of(model, "linear", objective_of(x))
    assert found.any() and moment_of(model, "linear", objective_of(x.clone().requires_grad_(True))).equal(found)
