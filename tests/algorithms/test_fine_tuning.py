"""Fine-tuning trains what an algorithm left, and leaves its plan alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spectrim.algorithms.fine_tuning import FineTuning
from spectrim.algorithms.truncation import Truncation
from spectrim.decomposers.svd import SVD
from spectrim.errors import UserError
from spectrim.statistics.objective import Objective
from spectrim.training.recipe import Recipe

RECIPE = Recipe(epochs=20, lr=0.1, precision="float32")


def test_it_lowers_the_loss_and_keeps_the_plan(net: nn.Module, objective: Objective) -> None:
    selector = Truncation(ratio=0.6)
    cut = selector.compress(net, SVD(), objective)
    tuned = FineTuning(selector, RECIPE).compress(net, SVD(), objective)
    assert tuned.plan == cut.plan and tuned.cost == cut.cost
    assert objective.evaluate(tuned.model, "train").loss < 0.9 * objective.evaluate(cut.model, "train").loss
    assert [entry["epoch"] for entry in tuned.log] == list(range(20))


def test_batchnorm_cannot_follow_a_model_that_was_left(net: nn.Module, objective: Objective) -> None:
    tuned = FineTuning(Truncation(ratio=0.6), replace(RECIPE, epochs=1)).compress(net, SVD(), objective)
    assert tuned.settle("keep", objective) is tuned
    with pytest.raises(UserError, match="which a training leaves: use keep"):
        tuned.settle("follow", objective)


def test_it_is_the_same_on_every_run_and_after_a_kill(net: nn.Module, objective: Objective, tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    algorithm = FineTuning(Truncation(ratio=0.6), RECIPE, state=str(state))
    first = algorithm.compress(net, SVD(), objective)
    assert state.exists()
    again = algorithm.compress(net, SVD(), objective)  # from the state: all its epochs are done
    assert again.log == first.log
    for name, value in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)


def test_what_it_cannot_work_with_is_one_line(net: nn.Module, batches: Any) -> None:
    with pytest.raises(UserError, match="^train batches are missing; pass train="):
        FineTuning(Truncation(ratio=0.6), RECIPE).compress(
            net, SVD(), Objective(F.cross_entropy, {"calibration": batches})
        )
    with pytest.raises(UserError, match="selector='truncation' is not of type Algorithm"):
        FineTuning("truncation", RECIPE)  # type: ignore[arg-type]
