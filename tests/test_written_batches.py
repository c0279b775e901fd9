"""A batch is read as the loader gave it, whether the model or the loader writes to its memory afterwards."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim
from spectrim.refit.refinement import Refinement


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 5)).eval()


class WritesInputs(nn.Module):
    """Scales its inputs in place."""

    def __init__(self) -> None:
        super().__init__()
        self.body = plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.sub_(0.5).mul_(2))


class OneMemory:
    """Batches that are written into the same memory, one after another."""

    def __init__(self, batches: list[tuple[Any, Tensor]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        held = tuple(torch.empty_like(own) for own in self.batches[0])
        for batch in self.batches:
            for memory, own in zip(held, batch, strict=True):
                memory.copy_(own)
            yield held  # type: ignore[misc]


REFINED = spectrim.Joint(params_kept=0.6, refine=Refinement(samples=64))


@pytest.mark.parametrize("algorithm", [REFINED, spectrim.RankSelection()], ids=["joint", "rank selection"])
def test_a_batch_is_what_the_loader_gave_whoever_writes_to_it_afterwards(algorithm: Any) -> None:
    torch.manual_seed(0)
    data, model = [(torch.randn(16, 12), torch.randint(5, (16,))) for _ in range(4)], plain()
    writing = WritesInputs()
    writing.body.load_state_dict(model.state_dict())
    moved = [(0.5 + x / 2, targets) for x, targets in data]
    before = copy.deepcopy(moved)
    first, *others = (
        spectrim.compress(own, calibration=batches, algorithm=algorithm)
        for own, batches in ((model, data), (model, OneMemory(data)), (writing, moved))
    )
    assert first.plan and all(torch.equal(*own) for own in zip(moved[-1], before[-1], strict=True))
    for other in others:
        for ours, theirs in zip(first.model.parameters(), other.model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
