"""What a model's output says: its loss, whether it is right, and of language models the loss that perplexity is of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spectrim.errors import UserError, first_line

Loss = Callable[[Any, Any], Tensor]  # of the model's output and the targets: the mean over the batch, a scalar
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


def are_scores(outputs: Any, targets: Any) -> bool:
    """Whether the outputs are, or hold, one row of class scores a target."""
    scores = logits_of(outputs)
    return (
        isinstance(scores, Tensor)
        and isinstance(targets, Tensor)
        and scores.ndim == 2
        and targets.ndim == 1
        and not targets.is_floating_point()
    )


def loss_of(loss: Loss, outputs: Any, targets: Any) -> Tensor:
    """The loss of a batch. Raises ``UserError`` with one line on why these targets do not fit these outputs."""
    scores = logits_of(outputs)
    if are_scores(scores, targets):
        rows, classes = scores.shape
        if rows != len(targets):
            raise UserError(f"the model gave {rows} rows of logits for {len(targets)} targets")
        if targets.numel() and int(targets.max()) >= classes:
            raise UserError(f"target {int(targets.max())} does not fit a model with {classes} classes")
    try:
        value = loss(scores if loss is F.cross_entropy else outputs, targets)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise UserError(f"the loss failed on these outputs and targets: {first_line(error)}") from error
    if not isinstance(value, Tensor) or value.ndim:
        raise UserError("the loss must return a scalar tensor, the mean over the batch")
    return value


def answered_rightly(loss: Loss, outputs: Any, targets: Any) -> int | None:
    """How many samples of a batch are classified, or answered, rightly; None where the outputs are no scores."""
    if isinstance(loss, SpanLoss):
        return loss.right(outputs, targets)
    return int((logits_of(outputs).argmax(1) == targets).sum()) if are_scores(outputs, targets) else None


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
