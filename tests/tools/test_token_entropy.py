"""The cross-entropy of tokens in blocks is that of torch, bit for bit, and so is its gradient."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spectrim.tools import token_entropy

WORDS = 50


def cases() -> list[Any]:
    return [
        pytest.param(block, ahead, dtype, id=f"{block}, {ahead} ahead, {dtype}")
        for block in (1, 3 * WORDS, 20 * WORDS, 10**6)
        for ahead in (0, 1)
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
    ]


def given(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 9, WORDS, generator=generator).to(dtype)
    targets = torch.randint(0, WORDS, (4, 9), generator=generator)
    targets[1, 6:] = -100
    targets[3] = -100
    return scores.requires_grad_(True), targets


@pytest.mark.parametrize(("block", "ahead", "dtype"), cases())
def test_loss_and_gradient_are_those_of_torch(
    block: int, ahead: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_entropy, "BLOCK", block)
    scores, targets = given(dtype)
    rows, wanted = scores[:, : 9 - ahead].flatten(0, 1).float(), targets[:, ahead:]
    expected = F.cross_entropy(rows, wanted.flatten(), ignore_index=-100)
    found = token_entropy.cross_entropy(scores, wanted, -100)
    assert found.equal(expected) and found.dtype == torch.float32
    gradients = [torch.autograd.grad(3.7 * loss, scores)[0] for loss in (found, expected)]
    assert gradients[0].equal(gradients[1])


def test_blocks_hold_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for block in (1, 120, 1000, 10**6):
        monkeypatch.setattr(token_entropy, "BLOCK", block)
        scores = torch.arange(7 * 11 * 10).view(7, 11, 10)
        blocks = [scores[at].flatten() for at in token_entropy.row_blocks(scores)]
        assert torch.cat(blocks).equal(scores.flatten())
        assert max(map(len, blocks)) <= max(block, 10)


@pytest.mark.parametrize("target", [-1, WORDS])
def test_a_target_that_is_no_word_is_refused(target: int) -> None:
    scores, targets = given(torch.float32)
    targets[0, 0] = target
    with pytest.raises(RuntimeError, match="out of bounds"):
        token_entropy.cross_entropy(scores, targets, -100)
