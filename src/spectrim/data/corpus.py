"""Text corpora for language models: blocks of tokens from documents, each document in one split only."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch

from spectrim.data.own_text import mixed, own_text
from spectrim.data.splits import Pools
from spectrim.data.text import TextSplit, TextSplits, blocks, identity_of, predicted
from spectrim.errors import UserError
from spectrim.fetch import pretrained
from spectrim.losses import token_loss

T = TypeVar("T")


@dataclass(frozen=True)
class Corpus(Pools, ABC):
    """A corpus and the settings of its splits.

    ``calibration_seed`` shuffles the documents of the pool ``calibration_from``. Calibration takes the first documents,
    as many as its blocks need; verification takes the next ones. No document is in two splits, unless
    ``calibration_from`` is ``train`` or ``test``.

    ``calibration_size``, ``verification_size``, ``test_size``: numbers of blocks of ``context`` tokens.
    ``held_out``: number of documents kept from training.
    ``tokenizer``: name of the model whose tokenizer is used, see ``pretrained.opened``.
    ``own_text``: number of further calibration blocks, which this model writes itself (``own_text.own_text``).
    """

    tokenizer: str = "smollm2"
    context: int = 256
    calibration_size: int = 64
    verification_size: int = 32
    test_size: int = 128
    batch_size: int = 8
    own_text: int = 0

    noun: ClassVar[str] = "documents"
    name: ClassVar[str]

    @abstractmethod
    def documents(self) -> tuple[list[str], list[str]]:
        """Return the training documents and the test documents, each in a fixed order."""

    @property
    def title(self) -> str:
        """Name of the corpus in descriptions."""
        return self.name

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.test_size < 1:
            raise UserError(f"test_size must be at least 1, got {self.test_size}")
        if self.own_text < 0:
            raise UserError(f"own_text must be at least 0 blocks, got {self.own_text}")

    def load(self) -> TextSplits:
        """Return the four splits.

        Raises ``UserError`` where the texts or the tokenizer are unavailable, or the texts hold too few tokens.
        """
        pretrained.require_context(self.tokenizer, self.context)
        tokenizer = pretrained.tokenizer(self.tokenizer)
        rest, of_test = self.documents()
        if not 0 <= self.held_out < len(rest):
            raise UserError(f"held_out must lie in 0..{len(rest) - 1} documents, got {self.held_out}")
        train = rest[self.held_out :]
        pool = {"held_out": rest[: self.held_out], "train": train, "test": of_test}[self.calibration_from]
        pool = shuffled(pool, self.calibration_seed)
        calibration, begun = self._first(tokenizer, pool, self.calibration_size, "calibration")
        verification, _ = self._first(tokenizer, pool[begun:], self.verification_size, "verification")
        test, _ = self._first(tokenizer, of_test, self.test_size, "test")
        calibration = self._with_own_text(calibration)  # last, as it takes minutes and the others may be refused
        splits = {"calibration": calibration, "verification": verification, "test": test}
        counts = ", ".join(f"{part} {predicted(split.labels):,}" for part, split in splits.items())
        if self.own_text:
            counts += f"; {self.own_text} blocks of the calibration are text that the model wrote itself"
        return TextSplits(
            name=self.title,
            train=TextSplit(
                lambda: blocks(tokenizer, train, self.context)[0],
                identity_of(tokenizer, self.context, train),
                self.batch_size,
                f"{self.title} train",
            ),
            calibration=calibration,
            verification=verification,
            test=test,
            description=f"{self.title} in blocks of {self.context} tokens ({self.tokenizer}); predicted: {counts}",
            loss=token_loss,
        )

    def _with_own_text(self, calibration: TextSplit) -> TextSplit:
        """Return the calibration blocks and those that the model writes, mixed."""
        if not self.own_text:
            return calibration
        model = pretrained.opened("AutoModelForCausalLM", self.tokenizer, dtype=torch.float32, use_safetensors=True)
        written = own_text(model, self.own_text, self.context, self.calibration_seed, self.batch_size)
        return mixed(calibration, written, self.calibration_seed)

    def _first(self, tokenizer: Any, documents: Sequence[str], count: int, part: str) -> tuple[TextSplit, int]:
        """Return the first ``count`` blocks of ``documents``, and the number of documents that they use."""
        try:
            made, begun = blocks(tokenizer, documents, self.context, count)
        except UserError as error:
            raise UserError(f"{self.title}, {part}: {error}") from None
        identity = identity_of(tokenizer, self.context, documents[:begun], [count])
        return TextSplit(lambda: made, identity, self.batch_size, f"{self.title} {part}"), begun


def shuffled(documents: Sequence[T], seed: int) -> list[T]:
    """Return ``documents`` in a random order that ``seed`` determines."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    return [documents[index] for index in order.tolist()]
