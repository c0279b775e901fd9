"""How far outputs move with every layer cut, beside how far Theorem 1 lets them."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spectrim.algorithms.bound_probe import BoundProbe
from spectrim.decomposers.svd import SVD
from spectrim.errors import UserError
from spectrim.models.small import BiasFreeMLP, LeNet5
from spectrim.statistics.objective import Objective
from spectrim.theory.bounds import output_bound
from spectrim.theory.chain import chain_of

BATCHES = [(torch.randn(n, 1, 4, 4), torch.randint(10, (n,))) for n in (5, 3)]


def test_every_ratio_is_measured_with_all_layers_cut() -> None:
    model = BiasFreeMLP(3, 12, image_size=4)
    objective = Objective(F.cross_entropy, {"calibration": BATCHES})
    found = BoundProbe(ratios=(0.25, 0.9)).measure(model, SVD(), objective)
    assert not found.notes
    x = torch.cat([x for x, _ in BATCHES])
    stages = chain_of(model, SVD(), x).stages
    for step, ranks in zip(found.rows, ([3, 3, 2], [11, 11, 9]), strict=True):
        cut = copy.deepcopy(model)
        for place, rank in zip((1, 3, 5), ranks, strict=True):
            cut[place] = SVD().spectrum(model[place]).factor(rank)
        with torch.no_grad():
            moved = (model(x) - cut(x)).norm(dim=1).max().item()
        assert step["measured"] == pytest.approx(moved, rel=1e-5)
        assert step["bound"] == pytest.approx(output_bound(stages, ranks, x.flatten(1).norm(dim=1).max().item()))
        assert 0 < step["measured"] <= step["bound"] and step["loss_bound"] == pytest.approx(2**0.5 * step["bound"])
        assert step["loss_change"] == pytest.approx(objective.evaluate(cut).loss - objective.evaluate(model).loss)
    assert found.rows[0]["bound"] > found.rows[1]["bound"]


def test_convolutions_and_biases_are_within_their_bound() -> None:
    batches = [(torch.randn(6, 1, 20, 20), torch.randint(10, (6,)))]
    found = BoundProbe().measure(LeNet5(image_size=20), SVD(), Objective(F.cross_entropy, {"calibration": batches}))
    assert len(found.rows) == 3 and all(0 < step["measured"] < step["bound"] for step in found.rows)


def test_where_no_theorem_applies_the_measurement_stays_and_a_note_says_why(
    net: nn.Sequential, objective: Objective
) -> None:
    found = BoundProbe(ratios=[0.5]).measure(net, SVD(), objective)
    (step,) = found.rows
    assert step["bound"] is step["loss_bound"] is None and step["measured"] > 0
    assert found.notes == ["no bound: no Lipschitz constant is known for BatchNorm2d, and the bounds need one"]


def test_outputs_that_are_not_one_tensor_are_refused() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 10)

        def forward(self, x: Any) -> Any:
            return {"logits": self.layer(x.flatten(1))}

    objective = Objective(lambda out, y: F.cross_entropy(out["logits"], y), {"calibration": BATCHES})
    with pytest.raises(UserError, match="compared as one tensor; this model gives a dict"):
        BoundProbe().measure(Pair(), SVD(), objective)


@pytest.mark.parametrize("ratios", [[], [0.0], [1.0], [0.5, -0.1], ["half"], 0.5])
def test_ratios_that_cannot_be_are_refused(ratios: Any) -> None:
    with pytest.raises(UserError, match="ratios"):
        BoundProbe(ratios=ratios)
