"""Losses of classifiers, language models and question answering models, and counts of correct predictions."""

import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from spectrim.batches import cloned, with_tensors
from spectrim.errors import UserError, first_line
from spectrim.tools import token_entropy
from spectrim.tools.normals import Normals
from spectrim.tools.precision import HALVES, as_given, wide

Loss = Callable[[Any, Any], Tensor]  # (outputs, targets) → mean over the batch, a scalar
IGNORED = -100  # the label of a token that is not predicted, as in transformers and torch
PROBABILITIES = 1e-2  # from 1, the sum of the probabilities of all classes, which may be held in 16 bits
LOG_PROBABILITIES = 1e-3  # from 0, the logarithm of the sum of a row that a log-softmax has made


def logits_of(outputs: Any) -> Any:
    """Return ``outputs["logits"]`` if it exists, as in the outputs of transformers; otherwise return ``outputs``."""
    return outputs["logits"] if isinstance(outputs, Mapping) and "logits" in outputs else outputs


def taken_by(loss: Loss, outputs: Any) -> Any:
    """Return what ``loss`` is called on: the logits of named outputs where it is one of torch."""
    return logits_of(outputs) if loss is F.cross_entropy or isinstance(loss, _Loss) else outputs


@dataclass(frozen=True)
class TokenLoss:
    """Mean cross-entropy, in nats, of the next token, or of a label at each token, over a batch.

    Perplexity is ``exp`` of this mean over all predicted tokens of a split. ``Objective`` computes that mean by
    weighting each batch by its ``count``, so sequences may differ in length.

    ``outputs``: logits of shape (N, T, V), or a mapping that holds them as ``logits``.
    ``targets``: token ids, int64 of shape (N, T), with ``IGNORED`` at padding on the right.
    ``ahead``: how far ahead the target of a position lies. With 1 the first token of a sequence is never predicted.
        With 0 the targets are labels of the tokens, as in token classification or in masked language models.
    """

    ahead: int = 1

    def __call__(self, outputs: Any, targets: Tensor) -> Tensor:
        logits, wanted = logits_of(outputs), targets[:, self.ahead :]
        predicting = self._predicting(outputs)
        if logits.ndim == 3 and predicting.shape[:2] == wanted.shape and logits.numel() > token_entropy.BLOCK:
            return token_entropy.cross_entropy(logits, wanted, IGNORED)
        return F.cross_entropy(predicting.flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORED)

    def count(self, targets: Tensor) -> int:
        """Return the number of predicted tokens."""
        return int(self.predicted(targets).sum())

    def predicted(self, targets: Tensor) -> Tensor:
        """Return which targets are predicted, bool of shape (N, T - ahead)."""
        return targets[:, self.ahead :] != IGNORED

    def _predicting(self, outputs: Any) -> Tensor:
        logits = logits_of(outputs)
        return logits[:, : logits.shape[1] - self.ahead]

    def predictions(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return the logits of every predicted token, float32 of shape (tokens, V)."""
        return self._predicting(outputs)[self.predicted(targets)].float()


@dataclass(frozen=True)
class SpanLoss:
    """Mean cross-entropy, in nats, of the start and end positions of an answer in a text.

    ``outputs``: a mapping with ``start_logits`` and ``end_logits``, each of shape (N, T), as question answering models
    of transformers return.
    ``targets``: positions of the first and last token of the answer, int64 of shape (N, 2).
    """

    def __call__(self, outputs: Any, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.predictions(outputs, targets), targets.T.flatten())

    def predictions(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return the start scores of every position, then the end scores, float32 of shape (2 N, T)."""
        return torch.cat([outputs["start_logits"], outputs["end_logits"]]).float()

    def right(self, outputs: Any, targets: Tensor) -> int:
        """Return the number of samples for which both positions are correct."""
        places = self.predictions(outputs, targets).argmax(1).view(2, -1).T
        return int((places == targets).all(1).sum())


def are_scores(outputs: Any, targets: Any) -> bool:
    """Return whether the outputs are, or hold, one row of class scores per target."""
    scores = logits_of(outputs)
    return (
        isinstance(scores, Tensor)
        and isinstance(targets, Tensor)
        and scores.ndim == 2
        and targets.ndim == 1
        and not targets.is_floating_point()
    )


def have_scores(loss: Loss, outputs: Any, targets: Any) -> bool:
    """Return whether the outputs hold a row of scores for each prediction.

    Rows of numbers with a whole number each need be no class scores: a loss may compare embeddings, or count.
    """
    if isinstance(loss, TokenLoss | SpanLoss) or not are_scores(outputs, targets):
        return isinstance(loss, TokenLoss | SpanLoss)
    return _takes_classes(loss) or _is_of_softmax(loss, outputs, targets)


def ignored_class(loss: Loss) -> int | None:
    """Return the class whose targets a loss of torch ignores; None for other losses."""
    if loss in (F.cross_entropy, F.nll_loss):
        return IGNORED
    return loss.ignore_index if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) else None


def _takes_classes(loss: Loss) -> bool:
    return loss in (F.cross_entropy, F.nll_loss) or isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss)


_OF_SOFTMAX: "weakref.WeakKeyDictionary[Any, bool]" = weakref.WeakKeyDictionary()


def _is_of_softmax(loss: Loss, outputs: Any, targets: Tensor) -> bool:
    """Return whether ``loss`` reads but the softmax of class scores: it stays the same where a row is shifted.

    Rows of log-probabilities are class scores, too. The first batch decides for all of them.
    """
    with suppress(TypeError):  # it allows no weak reference or has no hash
        if loss not in _OF_SOFTMAX:
            _OF_SOFTMAX[loss] = _stays(loss, outputs, targets)
        return _OF_SOFTMAX[loss]
    return _stays(loss, outputs, targets)


@torch.no_grad()
def _stays(loss: Loss, outputs: Any, targets: Tensor) -> bool:
    scores = logits_of(outputs)
    if not _fit(loss, scores, targets):
        return False
    if bool((scores.float().logsumexp(1).abs() < LOG_PROBABILITIES).all()):  # of a model that ends in a log-softmax
        return True
    steps = torch.linspace(-1, 1, len(scores) + 1)[1:].to(scores).unsqueeze(1) * (1 + scores.abs().max())

    def value(shift: Tensor) -> Tensor:
        moved = with_tensors(outputs, lambda own: own + shift if own is scores else own.clone())
        return torch.as_tensor(loss(moved, targets.clone())).double()

    tolerance = 1e-4 if scores.dtype in (torch.float32, torch.float64) else 5e-2
    usual = value(torch.zeros_like(steps))
    return bool((value(steps) - usual).abs() <= tolerance * (1 + usual.abs()))


def _fit(loss: Loss, scores: Tensor, targets: Tensor) -> bool:
    """Return whether there is a row for each target, and a class unless ``loss`` ignores it."""
    if (ignored := ignored_class(loss)) is not None:
        targets = targets.where(targets != ignored, 0)
    return len(scores) == len(targets) and not (targets.numel() and int(targets.max()) >= scores.shape[1])


def scores_of(loss: Loss, outputs: Any, targets: Any) -> Tensor | None:
    """Return one row of scores for each prediction, float32; None where the outputs are no scores."""
    if isinstance(loss, TokenLoss | SpanLoss):
        return loss.predictions(outputs, targets)
    return logits_of(outputs).float() if have_scores(loss, outputs, targets) else None


def loss_of(loss: Loss, outputs: Any, targets: Any) -> Tensor:
    """Return the loss of a batch. Raises ``UserError`` where the targets do not fit the outputs."""
    scores = logits_of(outputs)
    if are_scores(scores, targets) and not _fit(loss, scores, targets) and not _takes(loss, outputs, targets):
        rows, classes = scores.shape
        if rows != len(targets):
            raise UserError(
                f"the model gave {rows} rows of logits for {len(targets)} targets; give a target for each row"
            )
        raise UserError(f"target {int(targets.max())} does not fit a model with {classes} classes; they count from 0")
    if isinstance(loss, TokenLoss) and isinstance(scores, Tensor) and scores.ndim == 3 and targets.ndim > 1:
        given, wanted = scores.shape[1], targets.shape[1]
        if given != wanted:
            raise UserError(
                f"the model scores {given} positions for {wanted} targets, as with a prompt of peft in front of them; "
                "give loss=, a function of the outputs and the targets that tells which positions they are"
            )
    if loss is F.cross_entropy and not isinstance(scores, Tensor):
        raise UserError(
            f"the outputs are a {type(scores).__name__}, which cross-entropy does not take; give loss=, a function of "
            "them and the targets, or an algorithm that measures no loss, such as Truncation"
        )
    if loss is F.cross_entropy and not _are_probabilities(scores, targets):
        raise UserError(
            "cross-entropy takes classes, or a probability of each class, and these targets are neither; give loss=, "
            "such as torch.nn.BCEWithLogitsLoss() for samples of several classes, or torch.nn.MSELoss() for numbers"
        )
    targets = cloned(targets)  # a loss may write to them
    try:
        with as_given():
            value = loss(*_wide(loss, taken_by(loss, outputs), targets))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        advice = "; give classes as int64 tensors, or loss=, a function of both" if loss is F.cross_entropy else ""
        raise UserError(f"the loss failed on these outputs and targets: {first_line(error)}{advice}") from error
    if not isinstance(value, Tensor) or value.ndim:
        raise UserError("the loss must return a scalar tensor, the mean over the batch")
    return value


def _wide(loss: Loss, *given: Any) -> list[Any]:
    """Return outputs and targets for a loss of torch in float32 or more: of 16 bits a mean would have three digits.

    A loss of the user's own gets them as they are, as does one that holds weights in 16 bits.
    """
    held = loss.buffers() if isinstance(loss, nn.Module) else ()
    of_torch = isinstance(loss, _Loss) or getattr(loss, "__module__", "") == F.__name__
    if not of_torch or any(own.dtype in HALVES for own in held):
        return list(given)
    return [with_tensors(part, lambda own: wide(own) if own.dtype in HALVES else own) for part in given]


def _are_probabilities(scores: Tensor, targets: Any) -> bool:
    """Return whether the targets of cross-entropy are classes, or numbers of the shape of ``scores`` that sum to 1."""
    if not isinstance(targets, Tensor) or targets.shape != scores.shape or scores.ndim < 2:
        return True  # torch tells what does not fit
    if not targets.is_floating_point():
        return False
    sums = targets.float().sum(1)
    return bool(((sums - 1).abs() < PROBABILITIES).all())


def _takes(loss: Loss, outputs: Any, targets: Tensor) -> bool:
    """Return whether ``loss`` takes these targets, which are no classes. On the CPU, as a card would not recover."""
    if _takes_classes(loss):
        return False
    try:
        with torch.no_grad():
            loss(with_tensors(outputs, lambda own: own.detach().cpu().clone()), targets.cpu().clone())
    except Exception:  # whatever the loss raises
        return False
    return True


def fisher_direction(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a random direction v for every row z of ``logits``. Shape (N, V).

    The covariance is ``E[v v^T] = diag(p) - p p^T`` with ``p = softmax(z)``. The second moment of the gradient of
    ``v^T z`` is therefore the Fisher information of cross-entropy. The gradient of the loss at a label drawn from p has
    the same second moment. For a confident row, however, that label is almost always the same and its gradient is
    almost zero. A Gaussian direction is equally informative for every row, so far fewer rows suffice.
    """
    return direction(logits.detach(), Normals(logits.numel(), generator))


def direction(logits: Tensor, normals: Normals) -> Tensor:
    """Return ``fisher_direction`` of ``logits``, for the next of some random numbers."""
    p = logits.float().softmax(-1)
    v = p.sqrt() * normals.take(p.numel()).view(p.shape).to(p)
    return v - p * v.sum(-1, keepdim=True)


token_loss, label_loss, span_loss = TokenLoss(), TokenLoss(ahead=0), SpanLoss()
