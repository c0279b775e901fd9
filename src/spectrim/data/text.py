"""Tokenised texts, and the splits of a text set."""

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

BETWEEN = "\n\n"  # separates documents within a block


class Tokens(NamedTuple):
    """Tokenised texts.

    ``ids``: token ids, int64 of shape (N, T).
    ``mask``: 1 for a token, 0 for padding, int64 of shape (N, T).
    ``labels``: int64 of shape (N,), (N, 2) or (N, T).
    ``types``: for rows of two texts, the text that each token belongs to; None if the tokenizer does not mark it.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor
    types: Tensor | None = None


@dataclass(frozen=True, eq=False)
class TextSplit:
    """Texts that can be iterated repeatedly as batches ``(inputs, labels)``; the last one may be shorter.

    ``inputs`` is a mapping with ``input_ids`` and ``attention_mask``, which models of transformers take by keyword. It
    also has ``token_type_ids`` if the tokens have types.

    ``make``: function that tokenises; it runs once, at the first access to the tokens.
    ``identity``: string that identifies the content.
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
        """Labels, int64.

        The shape is (N,) for classes, (N, 2) for answers (``losses.SpanLoss``), and (N, T) for a language model, whose
        labels are the token ids (``losses.TokenLoss``).
        """
        return self.tokens.labels

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for start in range(0, len(self.labels), self.batch_size):
            yield self.at(slice(start, start + self.batch_size))

    def at(self, chosen: slice | Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return the texts at the indices ``chosen`` as one batch."""
        tokens = self.tokens
        given = {"input_ids": tokens.ids, "attention_mask": tokens.mask, "token_type_ids": tokens.types}
        return {name: part[chosen] for name, part in given.items() if part is not None}, tokens.labels[chosen]

    def digest(self) -> str:
        """Return the sha256 of ``identity``."""
        return hashlib.sha256(self.identity.encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class TextSplits:
    """The four splits of a text set. An algorithm never sees ``test``.

    ``description``: sample counts and context length, in words.
    ``loss``: the loss that fits the labels.
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
    """Return a sha256 over the texts, their labels, the tokenizer's vocabulary and rules, and the context length."""
    sha = hashlib.sha256(f"{context}\0{list(labels)}\0{_rules(tokenizer)}".encode())
    for text in texts:
        sha.update(str(text).encode() + b"\0")
    return sha.hexdigest()


def _rules(tokenizer: Any) -> str:
    fast = getattr(tokenizer, "backend_tokenizer", None)
    return fast.to_str() if fast is not None else repr(sorted(tokenizer.get_vocab().items()))


def classified(tokenizer: Any, texts: Sequence[str], labels: Sequence[int], context: int) -> Tokens:
    """Tokenise each text separately; truncate or pad it to ``context`` tokens."""
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
    """Tokenise each question and its text as one row; truncate the text so that the row has ``context`` tokens.

    The labels are the positions of the answer's first and last token. If there is no answer, or truncation removes it,
    both are position 0, as usual (Devlin et al., arXiv 1810.04805).

    ``spans``: first character of the answer in the text, and the character after its last.
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
    """Concatenate documents and split them into blocks of ``context`` tokens.

    Returns the blocks and the number of documents that they use. There is no padding; an incomplete last block is
    dropped.

    ``count``: number of blocks; None for all of them.
    Raises ``UserError`` where the documents hold fewer than ``count`` blocks.
    """
    ids: list[int] = []
    begun = 0
    for begun, document in enumerate(documents, start=1):
        if count is not None and len(ids) >= count * context:
            begun -= 1
            break
        # Special tokens for the start and end of a text would appear in the middle of a block, once per document.
        ids += tokenizer(document + BETWEEN, add_special_tokens=False, verbose=False)["input_ids"]
    whole = len(ids) // context if count is None else count
    if len(ids) < whole * context:
        raise UserError(f"{whole} blocks of {context} tokens were asked for, the documents hold {len(ids):,} tokens")
    return without_padding(torch.tensor(ids[: whole * context], dtype=torch.int64).view(whole, context)), begun


def without_padding(ids: Tensor) -> Tokens:
    """Return the blocks ``ids`` for a language model, every token of which counts."""
    return Tokens(ids, torch.ones_like(ids), ids)


def predicted(labels: Tensor) -> int:
    """Return the number of tokens that a language model predicts."""
    return int((labels[:, 1:] != IGNORED).sum())
