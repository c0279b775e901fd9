"""Text sets by their name on the Hugging Face hub, GLUE, SQuAD and WikiText, or a folder like them.

They are read by the library ``datasets``, which keeps what it fetched in a cache of its own and runs no code of a set.
"""

import re
from abc import abstractmethod
from typing import Any

from spectrim.data.classes import Classes, Labelled
from spectrim.data.corpus import Corpus, shuffled
from spectrim.data.text import Tokens, answered
from spectrim.errors import UserError, first_line
from spectrim.fetch import pretrained
from spectrim.losses import SpanLoss, span_loss
from spectrim.tools.settings import settings


def rows(dataset: str, subset: str, part: str) -> Any:
    """The rows of one part of a data set, as ``datasets`` gives them. Raises ``UserError`` where they cannot be had."""
    library = pretrained.imported("datasets")
    try:
        return library.load_dataset(dataset, subset or None, split=part)
    except (OSError, ValueError, RuntimeError, library.exceptions.DatasetsError) as error:
        which = f"{dataset}, subset {subset}" if subset else dataset
        raise UserError(f"part {part} of {which} cannot be had from datasets: {first_line(error)}") from error


def column(table: Any, name: str, kind: type) -> list[Any]:
    """One column. Raises ``UserError`` where there is none of that name, or it holds anything else than ``kind``."""
    if name not in table.column_names:
        raise UserError(f"the data set has no column {name!r}; it has {', '.join(table.column_names)}")
    values = list(table[name])
    for number, value in enumerate(values):
        if type(value) is not kind:
            raise UserError(f"column {name!r}, row {number}: {value!r} is not of type {kind.__name__}")
    return values


class _OnHub:
    """What is called by its name on the hub."""

    dataset: str
    subset: str

    @property
    def title(self) -> str:
        return f"{self.dataset} {self.subset}".strip()


class _Labelled(_OnHub, Classes):
    """Texts with labels, one row each."""

    test_part: str

    def __post_init__(self) -> None:
        self.check()

    @abstractmethod
    def part(self, table: Any, name: str) -> Labelled:
        """Texts and labels of the rows of one part."""

    def texts(self) -> tuple[Labelled, Labelled]:
        return self._drawn("train"), self._drawn(self.test_part)

    def _drawn(self, name: str) -> Labelled:
        """In an order drawn once: some sets are sorted, by class or by what they are about."""
        texts, labels = self.part(rows(self.dataset, self.subset, name), name)
        order = shuffled(range(len(texts)), 0)
        return [texts[index] for index in order], [labels[index] for index in order]


@settings
class HubClasses(_Labelled):
    """Labelled texts: the column ``text``, or two texts in one, separated as the tokenizer has it, and their ``label``.

    ``dataset``: a name of the hub or a folder; ``subset``: where it has several. ``train`` is cut as every training set
    is; the test texts are those of ``test_part``: GLUE publishes no labels of its own test set.
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
    """Questions about a text each, whose answer is a part of it (SQuAD, Rajpurkar et al., arXiv 1606.05250).

    ``answers``: the column of the answers' ``text`` and ``answer_start``; of several the first counts, none is what
    SQuAD 2.0 calls impossible. What is beyond ``context`` tokens is cut off, an answer there counts as none.
    Accuracy is that of both ends, an exact match with that answer. ``dataset``, ``subset``: as in ``HubClasses``.
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
    """The characters of the first answer, (0, 0) where there is none."""
    try:
        found = [(int(start), len(text)) for start, text in zip(answers["answer_start"], answers["text"], strict=True)]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the answers of row {number} are no lists of text and answer_start: {answers!r}") from error
    start, length = found[0] if found else (0, 0)
    return start, start + length


@settings
class HubCorpus(_OnHub, Corpus):
    """A corpus: the column ``text``, each document once, and none of the test documents among the others.

    ``begins``: a pattern of the rows that begin a document, such as the title of an article; empty: each row is one.
    ``dataset``, ``subset``: as in ``HubClasses``.
    """

    dataset: str = "Salesforce/wikitext"
    subset: str = "wikitext-2-raw-v1"
    text: str = "text"
    begins: str = " = [^=]"
    test_part: str = "test"
    held_out: int = 120

    name = "hub"

    def __post_init__(self) -> None:
        self.check()
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
