"""Texts as tokens, and the splits of a text set."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spectrim.errors import UserError
from spectrim.losses import IGNORED

BETWEEN = "\n\n"  # documents that share a block


class Tokens(NamedTuple):
    """``ids`` and ``mask`` (1: a token, 0: padding), int64 of shape (N, T). ``labels``: int64, shape (N,), (N, 2) or
    (N, T). ``types``: where a row is of two texts and the tokenizer tells them apart, which each token is of."""

    ids: Tensor
    mask: Tensor
    labels: Tensor
    types: Tensor | None = None


@dataclass(frozen=True, eq=False)
class TextSplit:
    """Texts that can be iterated again and again as batches ``(inputs, labels)``, the last one shorter.

    Inputs are the mapping of ``input_ids`` and ``attention_mask`` that transformers' models take by keyword. ``make``
    tokenises, once, when the tokens are first looked at; ``identity`` names what it is made of.
    """

    make: Callable[[], Tokens]
    identity: str
    batch_size: int
    name: str = "texts"

    @cached_property
    def tokens(self) -> Tokens:
        return self.make()

    @property
    def labels(self) -> Tensor:
        """Classes, shape (N,); answers (``losses.SpanLoss``), shape (N, 2); or for a language model the tokens
        themselves (``losses.TokenLoss``), shape (N, T)."""
        return self.tokens.labels

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for start in range(0, len(self.labels), self.batch_size):
            yield self.at(slice(start, start + self.batch_size))

    def at(self, chosen: slice | Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The texts at these places as one batch."""
        tokens = self.tokens
        given = {"input_ids": tokens.ids, "attention_mask": tokens.mask, "token_type_ids": tokens.types}
        return {name: part[chosen] for name, part in given.items() if part is not None}, tokens.labels[chosen]

    def digest(self) -> str:
        """sha256 of what the tokens are made of."""
        return hashlib.sha256(self.identity.encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class TextSplits:
    """The four splits of a text set, and the loss that their labels are meant for.

    A selector never sees ``test``. ``description``: counts and the context length in words.
    """

    name: str
    train: TextSplit
    calibration: TextSplit
    verification: TextSplit
    test: TextSplit
    description: str
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy

    @property
    def digest(self) -> str:
        """sha256 over the digests of the splits."""
        splits = (self.train, self.calibration, self.verification, self.test)
        return hashlib.sha256("".join(split.digest() for split in splits).encode()).hexdigest()


def identity_of(tokenizer: Any, context: int, texts: Sequence[Any], labels: Sequence[Any] = ()) -> str:
    """What names the tokens of these texts: the texts, the tokenizer's vocabulary and rules, the context length."""
    sha = hashlib.sha256(f"{context}\0{list(labels)}\0{_rules(tokenizer)}".encode())
    for text in texts:
        sha.update(str(text).encode() + b"\0")
    return sha.hexdigest()


def _rules(tokenizer: Any) -> str:
    fast = getattr(tokenizer, "backend_tokenizer", None)
    return fast.to_str() if fast is not None else repr(sorted(tokenizer.get_vocab().items()))


def classified(tokenizer: Any, texts: Sequence[str], labels: Sequence[int], context: int) -> Tokens:
    """Each text by itself, its end cut off beyond ``context`` tokens and padded up to that."""
    if not texts:
        nothing = torch.zeros(0, context, dtype=torch.int64)
        return Tokens(nothing, nothing, torch.zeros(0, dtype=torch.int64))
    encoded = tokenizer(
        list(texts),
        truncation=True,
        max_length=context,
        padding="max_length",
        padding_side="right",
        return_tensors="pt",
    )
    return Tokens(encoded["input_ids"], encoded["attention_mask"], torch.tensor(labels, dtype=torch.int64))


def answered(
    tokenizer: Any, texts: Sequence[tuple[str, str]], spans: Sequence[tuple[int, int]], context: int
) -> Tokens:
    """Each question and its text as one row, the end of the text cut off beyond ``context`` tokens.

    ``spans``: the characters of the text that the answer begins at and ends before. The labels are its first and its
    last token; where there is no answer, or it is cut off, both are the first of the row, as is usual (Devlin et al.,
    arXiv 1810.04805).
    """
    if not texts:
        nothing = torch.zeros(0, context, dtype=torch.int64)
        return Tokens(nothing, nothing, torch.zeros(0, 2, dtype=torch.int64))
    encoded = tokenizer(
        *(list(part) for part in zip(*texts, strict=True)),
        truncation="only_second",
        max_length=context,
        padding="max_length",
        padding_side="right",
        return_tensors="pt",
    )
    labels = []
    for row, (begin, end) in enumerate(spans):
        ends = [encoded.char_to_token(row, place, 1) for place in (begin, end - 1)] if end > begin else [None]
        labels.append([0, 0] if None in ends else ends)
    types = encoded.get("token_type_ids")
    return Tokens(encoded["input_ids"], encoded["attention_mask"], torch.tensor(labels, dtype=torch.int64), types)


def blocks(tokenizer: Any, documents: Sequence[str], context: int, count: int | None = None) -> tuple[Tokens, int]:
    """Documents one after the other, cut into blocks of ``context`` tokens: all of them or the first ``count``.

    Returns them with the number of documents begun. There is no padding; the rest that fills no block is dropped.
    Raises ``UserError`` where the documents hold fewer than ``count`` blocks.
    """
    ids: list[int] = []
    begun = 0
    for begun, document in enumerate(documents, start=1):
        if count is not None and len(ids) >= count * context:
            begun -= 1
            break
        # A model's own marks of beginning and end would come once a document, in the middle of a block.
        ids += tokenizer(document + BETWEEN, add_special_tokens=False, verbose=False)["input_ids"]
    whole = len(ids) // context if count is None else count
    if len(ids) < whole * context:
        raise UserError(f"{whole} blocks of {context} tokens were asked for, the documents hold {len(ids):,} tokens")
    rows = torch.tensor(ids[: whole * context], dtype=torch.int64).view(whole, context)
    return Tokens(rows, torch.ones_like(rows), rows), begun


def predicted(labels: Tensor) -> int:
    """Number of tokens that a language model predicts."""
    return int((labels[:, 1:] != IGNORED).sum())
