"""A backward pass comes by every layer, also where the model itself makes activations require a gradient."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import spectrim
from spectrim.errors import UserError

Change = Callable[[Tensor], Tensor]
Run = Callable[[nn.Module, Tensor], Tensor]
JOINT = {"algorithm": spectrim.Joint(params_kept=0.6, samples=32, refit=32, refit_by="loss")}
GREEDY = {"algorithm": spectrim.Joint(params_kept=0.6, samples=32, refit=0, ranks="greedy"), "layers_at_once": 2}
TWO_SIDED = {"algorithm": spectrim.Truncation(ratio=0.5), "decomposer": spectrim.TwoSidedSVD(samples=32)}


class Residual(nn.Module):
    """``change`` is applied before the first layer and between two, ``run`` calls the blocks."""

    def __init__(self, change: Change = Tensor.clone, run: Run = lambda block, x: block(x)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.change, self.run = change, run
        self.before, self.after = nn.Linear(12, 16), nn.Linear(16, 5)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 24), nn.ReLU(inplace=True), nn.Linear(24, 16)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(self.change(x))
        for block in self.blocks:
            x = x + self.run(block, x)
        return self.after(x)


def requiring(x: Tensor) -> Tensor:
    """What ``enable_input_require_grads`` of transformers does to the outputs of the embeddings."""
    return x.clone().requires_grad_(torch.is_grad_enabled())


def data() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(16, 12), torch.randint(5, (16,))) for _ in range(2)]


def equal(first: Any, second: Any) -> bool:
    ours, theirs = first.model.state_dict(), second.model.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("given", [JOINT, GREEDY, TWO_SIDED], ids=["knapsack", "greedy", "two-sided"])
@pytest.mark.parametrize(
    "model",
    [partial(Residual, requiring), partial(Residual, run=partial(checkpoint, use_reentrant=False))],
    ids=["requires a gradient", "checkpoints"],
)
def test_a_model_that_differentiates_activations_is_compressed_as_one_that_does_not(model: Any, given: Any) -> None:
    assert equal(*(spectrim.compress(make(), calibration=data(), **given) for make in (model, Residual)))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("given", [JOINT, TWO_SIDED, {"algorithm": spectrim.Lossless()}])
def test_checkpoints_that_allow_no_gradient_by_a_layer_are_said(given: Any) -> None:
    model = Residual(run=partial(checkpoint, use_reentrant=True))
    with pytest.raises(UserError, match="^no gradient flows back through the model: [^\n]*use_reentrant=False$"):
        spectrim.compress(model, calibration=data(), **given)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
def test_a_decoder_with_checkpoints_switched_on_is_compressed_as_one_without(tiny: Any, token_batches: Any) -> None:
    model = tiny("llama", tie_word_embeddings=False)
    with_checkpoints = copy.deepcopy(model).train()
    with_checkpoints.gradient_checkpointing_enable()
    given: Any = {"calibration": token_batches, "params_kept": 0.8}
    assert equal(spectrim.compress(model, **given), spectrim.compress(with_checkpoints, **given))
