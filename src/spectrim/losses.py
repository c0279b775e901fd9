"""What a model's output says, and the loss of a language model: the one definition of perplexity is its exponential."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # the label of a token that is not to be predicted, as transformers and torch have it


def logits_of(outputs: Any) -> Any:
    """The logits of an output that holds them by name, as those of transformers do; any other output itself."""
    return outputs["logits"] if isinstance(outputs, Mapping) and "logits" in outputs else outputs


@dataclass(frozen=True)
class TokenLoss:
    """Mean cross-entropy, in nats, of each token given those before it, over the tokens to be predicted.

    ``targets``: the token ids themselves, int64 of shape (N, T), ``IGNORED`` where there is padding (on the right).
    The shift by one position is made here, so that the first token of a sequence is never predicted. Outputs are logits
    (N, T, V), or hold them. Perplexity is ``exp`` of this mean over all tokens of a split, which ``Objective`` takes by
    weighing each batch by its ``count``, of whatever length its sequences are.
    """

    def __call__(self, outputs: Any, targets: Tensor) -> Tensor:
        logits = logits_of(outputs)[:, :-1].flatten(0, 1).float()
        return F.cross_entropy(logits, targets[:, 1:].flatten(), ignore_index=IGNORED)

    def count(self, targets: Tensor) -> int:
        """Number of tokens to be predicted."""
        return int((targets[:, 1:] != IGNORED).sum())

    def predictions(self, outputs: Any, targets: Tensor) -> Tensor:
        """The logits of every token to be predicted, float32 of shape (tokens, V)."""
        return logits_of(outputs)[:, :-1][targets[:, 1:] != IGNORED].float()


@dataclass(frozen=True)
class SpanLoss:
    """Mean cross-entropy, in nats, of where in a text an answer begins and of where it ends.

    ``targets``: the places of its first and its last token, int64 of shape (N, 2). Outputs hold ``start_logits`` and
    ``end_logits``, (N, T) each, as those of transformers' models for question answering do.
    """

    def __call__(self, outputs: Any, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.predictions(outputs, targets), targets.T.flatten())

    def predictions(self, outputs: Any, targets: Tensor) -> Tensor:
        """The scores of every place as a beginning, then those as an end, float32 of shape (2 N, T)."""
        return torch.cat([outputs["start_logits"], outputs["end_logits"]]).float()

    def right(self, outputs: Any, targets: Tensor) -> int:
        """Of how many samples both places are right."""
        places = self.predictions(outputs, targets).argmax(1).view(2, -1).T
        return int((places == targets).all(1).sum())


def fisher_direction(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A random v for every row z of ``logits``, with ``E[v v^T] = diag(p) - p p^T`` where p = softmax(z). Shape (N, V).

    The gradient of ``v^T z`` has the Fisher information of cross-entropy as its second moment, as the gradient of the
    loss at a label drawn from p has. Of a confident row such a label is almost always the same one and its gradient
    next to nothing; a Gaussian v says as much of every row, so that far fewer rows do.
    """
    p = logits.detach().float().softmax(-1)
    v = p.sqrt() * torch.randn(p.shape, generator=generator).to(p)
    return v - p * v.sum(-1, keepdim=True)


token_loss, span_loss = TokenLoss(), SpanLoss()
