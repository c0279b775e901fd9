"""Text sets from the Hugging Face hub by name, such as GLUE, SQuAD and WikiText, or from a folder of the same layout.

The library ``datasets`` reads them. It keeps downloads in its own cache and runs no code of a data set.
"""

import re
from abc import abstractmethod
from pathlib import Path
from typing import Any

from spectrim.data.classes import Classes, Labelled
from spectrim.data.corpus import Corpus, shuffled
from spectrim.data.text import Tokens, answered
from spectrim.errors import UserError, first_line
from spectrim.fetch import pretrained
from spectrim.losses import SpanLoss, span_loss
from spectrim.tools.settings import settings


def rows(dataset: str, subset: str, part: str) -> Any:
    """Return the rows of one part of a data set from ``datasets``. Raises ``UserError`` where they are unavailable."""
    library = pretrained.imported("datasets")
    if not Path(dataset).exists() and not pretrained.hub_answers():
        library.config.HF_HUB_OFFLINE = True  # load_dataset has no argument for this
    try:
        return library.load_dataset(dataset, subset or None, split=part)
    except (OSError, ValueError, RuntimeError, library.exceptions.DatasetsError) as error:
        which = f"{dataset}, subset {subset}" if subset else dataset
        raise UserError(f"part {part} of {which} cannot be had from datasets: {first_line(error)}") from error


def column(table: Any, name: str, kind: type) -> list[Any]:
    """Return one column. Raises ``UserError`` where it is missing or holds a value of another type than ``kind``."""
    if name not in table.column_names:
        raise UserError(f"the data set has no column {name!r}; it has {', '.join(table.column_names)}")
    values = list(table[name])
    for number, value in enumerate(values):
        if type(value) is not kind:
            raise UserError(f"column {name!r}, row {number}: {value!r} is not of type {kind.__name__}")
    return values


class _OnHub:
    """A data set that is identified by its name on the hub."""

    dataset: str
    subset: str

    @property
    def title(self) -> str:
        return f"{self.dataset} {self.subset}".strip()


class _Labelled(_OnHub, Classes):
    """Texts with labels, one row per text."""

    test_part: str

    @abstractmethod
    def part(self, table: Any, name: str) -> Labelled:
        """Return texts and labels of the rows of one part."""

    def texts(self) -> tuple[Labelled, Labelled]:
        return self._shuffled("train"), self._shuffled(self.test_part)

    def _shuffled(self, name: str) -> Labelled:
        """Return one part in a fixed random order, because some sets are sorted by class or topic."""
        texts, labels = self.part(rows(self.dataset, self.subset, name), name)
        order = shuffled(range(len(texts)), 0)
        return [texts[index] for index in order], [labels[index] for index in order]


@settings
class HubClasses(_Labelled):
    """Labelled texts, or labelled pairs of texts joined by the tokenizer's separator.

    ``dataset``: a name on the hub, or a folder.
    ``subset``: name of the subset, if there are several.
    ``text``, ``second``, ``label``: columns of the text, the second text (empty: none) and the label.
    ``test_part``: part that serves as test set. GLUE publishes no labels for its own test set.
    """

    dataset: str = "nyu-mll/glue"
    subset: str = "sst2"
    text: str = "sentence"
    second: str = ""
    label: str = "label"
    test_part: str = "validation"
    test_size: int = 872

    name = "hub"

    def part(self, table: Any, name: str) -> Labelled:
        texts, labels = column(table, self.text, str), column(table, self.label, int)
        if self.second:
            between = pretrained.tokenizer(self.tokenizer).sep_token or "\n"
            texts = [f"{a} {between} {b}" for a, b in zip(texts, column(table, self.second, str), strict=True)]
        if min(labels, default=0) < 0:
            raise UserError(f"part {name} of {self.title} has texts without a label; name another test_part")
        return texts, labels


@settings
class HubAnswers(_Labelled):
    """Questions whose answer is a span of a given text (SQuAD, Rajpurkar et al., arXiv 1606.05250).

    Accuracy is exact match: both ends of the span must be correct.

    ``dataset``, ``subset``: as in ``HubClasses``.
    ``answers``: column of the answers' ``text`` and ``answer_start``. The first answer counts. A question without an
    answer is one that SQuAD 2.0 calls impossible.
    ``context``: maximum length in tokens. A row is truncated there, and an answer beyond it counts as no answer.
    """

    dataset: str = "rajpurkar/squad"
    subset: str = ""
    question: str = "question"
    text: str = "context"
    answers: str = "answers"
    test_part: str = "validation"
    context: int = 384
    batch_size: int = 16

    noun = "questions"
    name = "hub"

    @property
    def loss(self) -> SpanLoss:
        return span_loss

    def encoded(self, tokenizer: Any, texts: list[Any], labels: list[Any]) -> Tokens:
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(f"the tokenizer of {self.tokenizer} does not tell where its tokens are; take a fast one")
        return answered(tokenizer, texts, labels, self.context)

    def part(self, table: Any, name: str) -> Labelled:
        questions, texts = (column(table, one, str) for one in (self.question, self.text))
        spans = [_span(answers, number) for number, answers in enumerate(column(table, self.answers, dict))]
        return list(zip(questions, texts, strict=True)), spans


def _span(answers: dict[str, Any], number: int) -> tuple[int, int]:
    """Return the first and end character of the first answer, or (0, 0) if there is none."""
    try:
        found = [(int(start), len(text)) for start, text in zip(answers["answer_start"], answers["text"], strict=True)]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the answers of row {number} are no lists of text and answer_start: {answers!r}") from error
    start, length = found[0] if found else (0, 0)
    return start, start + length


@settings
class HubCorpus(_OnHub, Corpus):
    """A corpus from the column ``text``, without duplicates. No test document is among the training documents.

    ``dataset``, ``subset``: as in ``HubClasses``.
    ``begins``: pattern of the rows that begin a document, such as the title of an article. If it is empty, each row is
    a document.
    """

    dataset: str = "Salesforce/wikitext"
    subset: str = "wikitext-2-raw-v1"
    text: str = "text"
    begins: str = " = [^=]"
    test_part: str = "test"
    held_out: int = 120

    name = "hub"

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            re.compile(self.begins)
        except re.error as error:
            raise UserError(f"begins is not a pattern ({error}): {self.begins!r}") from None

    def documents(self) -> tuple[list[str], list[str]]:
        train, test = (self._documents(part) for part in ("train", self.test_part))
        return shuffled([text for text in train if text not in test], 0), list(test)

    def _documents(self, part: str) -> dict[str, None]:
        found: list[str] = []
        for row in column(rows(self.dataset, self.subset, part), self.text, str):
            if found and self.begins and not re.match(self.begins, row):
                found[-1] += row
            else:
                found.append(row)
        return dict.fromkeys(text for text in found if text.strip())
