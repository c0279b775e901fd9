"""Cross-entropy of the scores of tokens without a copy of them, which is the largest tensor of a small decoder.

``F.cross_entropy`` takes a copy of the rows that predict, their log-softmax, which it keeps for the gradient, and two
further tensors on the way back. Here each is made for a block of rows at a time. Loss and gradient are the same, bit
for bit.

Shape suffixes: N sequences, T positions, P of them that predict, V words.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 1 << 20  # scores of a block: 4 MB in float32


def cross_entropy(scores_NTV: Tensor, targets_NP: Tensor, ignored: int) -> Tensor:
    """Return the mean cross-entropy, in float32, of the first P positions of each sequence.

    ``ignored``: the target of a position that does not count.
    Raises ``RuntimeError`` for another target outside of the V words.
    """
    return _CrossEntropy.apply(scores_NTV, targets_NP, ignored)


def row_blocks(scores_NPV: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield parts of the sequences and of their positions, in order, with about ``BLOCK`` scores each."""
    sequences, positions, words = scores_NPV.shape
    rows = max(1, BLOCK // max(words, 1))
    several, length = max(1, rows // max(positions, 1)), min(rows, positions)
    for first in range(0, sequences, several):
        for start in range(0, positions, max(length, 1)):
            yield slice(first, first + several), slice(start, start + length)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores_NTV: Tensor, targets_NP: Tensor, ignored: int) -> Tensor:
        ctx.save_for_backward(scores_NTV, targets_NP)
        ctx.ignored = ignored
        known = targets_NP != ignored
        predicting, words_NP = scores_NTV[:, : targets_NP.shape[1]], torch.where(known, targets_NP, 0)
        logs_NP = torch.empty(targets_NP.shape, dtype=torch.float32, device=scores_NTV.device)
        for at in row_blocks(predicting):
            logs_NP[at] = predicting[at].float().log_softmax(-1).gather(-1, words_NP[at].unsqueeze(-1)).squeeze(-1)
        # Added up by the same function as in F.cross_entropy, so in the same order.
        return F.nll_loss(logs_NP.view(-1, 1), torch.where(known, 0, ignored).flatten(), ignore_index=ignored)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        scores_NTV, targets_NP = ctx.saved_tensors
        each, found = gradient / (targets_NP != ctx.ignored).sum(), torch.zeros_like(scores_NTV)
        predicting, wanted = (own[:, : targets_NP.shape[1]] for own in (scores_NTV, found))
        for at in row_blocks(predicting):
            with torch.enable_grad():
                own = predicting[at].detach().float().requires_grad_(True)
                loss = F.cross_entropy(
                    own.flatten(0, 1), targets_NP[at].flatten(), ignore_index=ctx.ignored, reduction="sum"
                )
            wanted[at] = torch.autograd.grad(loss, own, each)[0]
        return found, None, None
