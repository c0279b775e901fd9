"""Base class of labelled text sets, whose label is a class or another label per row of tokens."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from spectrim.data.splits import Pools, draw_indices
from spectrim.data.text import TextSplit, TextSplits, Tokens, classified, identity_of
from spectrim.errors import UserError
from spectrim.fetch import pretrained

Labelled = tuple[list[Any], list[Any]]  # texts and their labels


@dataclass(frozen=True)
class Classes(Pools, ABC):
    """Labelled texts, each truncated to ``context`` tokens.

    ``tokenizer``: name of the model whose tokenizer is used.
    ``context``: maximum length, in tokens.
    ``test_size``: number of test texts used, always the same ones.
    """

    tokenizer: str = "minilm"
    context: int = 128
    calibration_size: int = 1000
    verification_size: int = 1000
    test_size: int = 5000
    batch_size: int = 50

    noun: ClassVar[str] = "texts"
    name: ClassVar[str]

    @property
    def loss(self) -> Callable[[Any, Any], Tensor]:
        """The loss that fits the labels."""
        return F.cross_entropy

    def encoded(self, tokenizer: Any, texts: list[Any], labels: list[Any]) -> Tokens:
        """Convert texts and labels to rows of ``context`` tokens."""
        return classified(tokenizer, texts, labels, self.context)

    @abstractmethod
    def texts(self) -> tuple[Labelled, Labelled]:
        """Return texts and labels of the training set and the test set, each in a fixed order."""

    @property
    def title(self) -> str:
        """Name of the set in descriptions."""
        return self.name

    def load(self) -> TextSplits:
        """Return the four splits.

        Raises ``UserError`` where the texts or the tokenizer are unavailable, or the settings do not fit them.
        """
        pretrained.require_context(self.tokenizer, self.context)
        tokenizer = pretrained.tokenizer(self.tokenizer)
        pretrained.require_padding(tokenizer, self.tokenizer)
        train, test = self.texts()
        indices = draw_indices(self, len(train[0]), len(test[0]))
        if not 1 <= self.test_size <= len(test[0]):
            raise UserError(f"test_size must lie in 1..{len(test[0])}, got {self.test_size}")
        source = test if indices.from_test else train

        def split(given: Labelled, chosen: list[int], part: str) -> TextSplit:
            texts, labels = [given[0][index] for index in chosen], [given[1][index] for index in chosen]
            identity = identity_of(tokenizer, self.context, texts, labels)
            make = lambda: self.encoded(tokenizer, texts, labels)  # noqa: E731
            return TextSplit(make, identity, self.batch_size, f"{self.title} {part}")

        return TextSplits(
            name=self.title,
            train=split(train, indices.train.tolist(), "train"),
            calibration=split(source, indices.calibration.tolist(), "calibration"),
            verification=split(source, indices.verification.tolist(), "verification"),
            test=split(test, list(range(self.test_size)), "test"),
            description=(
                f"{self.title}, {self.noun} cut off after {self.context} tokens ({self.tokenizer}): "
                f"train {len(indices.train):,}, calibration {self.calibration_size:,}, "
                f"verification {self.verification_size:,}, test {self.test_size:,}"
            ),
            loss=self.loss,
        )
