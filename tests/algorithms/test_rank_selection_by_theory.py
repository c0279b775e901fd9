"""Rank selection by Theorem 2: its delta, its promise, and a line where it does not apply."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.algorithms.rank_selection import RankSelection
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.decomposers.svd import SVD
from spectrim.errors import UserError
from spectrim.statistics.objective import Objective

Batches = list[tuple[Tensor, Tensor]]


def select(net: nn.Module, objective: Objective, **given: Any) -> Compressed:
    return RankSelection(delta="theory", **given).compress(net, SVD(), objective)


@pytest.fixture
def chain() -> nn.Sequential:
    """A chain with a spectrum so sharp that the theorem grants something."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 5))
    for layer in (model[0], model[4]):
        factors = SVD().spectrum(layer).svd
        S_R = 0.1 * 1e-3 ** torch.arange(factors.S_R.shape[-1]).double().clamp_max(3)
        layer.weight.data = (factors.U_OR * S_R[:, None] @ factors.Vh_RI).reshape(layer.weight.shape).float()
    return model


def test_the_delta_of_theorem_2_is_used_and_its_promise_kept(chain: nn.Sequential, batches: Batches) -> None:
    objective = Objective(F.cross_entropy, {"calibration": batches})
    result = select(chain, objective, epsilon=0.2)
    dense, step = result.log
    assert result.plan and step["passed"] and abs(step["loss"] - dense["loss"]) < 0.2
    norm = max(x.flatten(1).norm(dim=1).max().item() for x, _ in batches)
    sigma = [0.1 * 3, 0.1]
    assert chain[4].bias.any()  # which is behind the last layer: no cut acts on it
    assert step["delta"] == pytest.approx(0.2 / (math.sqrt(2) * norm * 2 * sigma[0] * sigma[1]), rel=1e-4)
    more = select(chain, objective, epsilon=0.4).log[1]["delta"]
    assert more == pytest.approx(2 * step["delta"])


def test_the_delta_of_theorem_2_never_exceeds_1(chain: nn.Sequential, batches: Batches) -> None:
    result = select(chain, Objective(nn.CrossEntropyLoss(), {"calibration": batches}), epsilon=1e6)
    assert result.log[1]["delta"] == 1 and {kept.rank for kept in result.plan.values()} == {1}


@pytest.mark.parametrize("loss", [lambda out, y: F.cross_entropy(out, y), nn.CrossEntropyLoss(torch.ones(5))])
def test_the_loss_must_be_cross_entropy(chain: nn.Sequential, batches: Batches, loss: Any) -> None:
    with pytest.raises(UserError, match="delta=theory is a theorem on cross-entropy"):
        select(chain, Objective(loss, {"calibration": batches}))


def test_the_model_must_be_a_chain(net: nn.Sequential, objective: Objective) -> None:
    with pytest.raises(UserError, match="no Lipschitz constant is known for BatchNorm2d") as refusal:
        select(net, objective)
    assert "\n" not in str(refusal.value)
