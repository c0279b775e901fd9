"""The page of licences names every committed weight, every model that is fetched and every data set."""

import json
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

from spectrim.fetch.pretrained import PACKAGED
from spectrim.models import imagenet

ROOT = Path(__file__).resolve().parents[1]
NOTICE = (ROOT / "NOTICE.md").read_text(encoding="utf-8")
CHECKPOINTS = sorted((ROOT / "results" / "checkpoints").rglob("*.safetensors"))
# Data sets that a user gives, or names on the hub, have terms that we do not know.
GIVEN = {"image_folder", "glue", "squad", "squad_text", "wikitext"}


def section(title: str) -> list[list[str]]:
    """The cells of the table below the heading ``title``, one list a row, without the header."""
    text = re.split(r"^## ", NOTICE, flags=re.MULTILINE)
    (own,) = [part for part in text if part.startswith(title)]
    rows = [line.strip("|").split("|") for line in own.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: path.stem)
def test_every_committed_weight_has_one_row(path: Path) -> None:
    name = str(path.relative_to(ROOT / "results" / "checkpoints").with_suffix(""))
    rows = [row for row in section("Committed weights") if any(fnmatch(name, one) for one in _names(row[0]))]
    assert len(rows) == 1
    start = json.loads(path.with_suffix(".json").read_text())["config"]["model"].get("name")
    assert (rows[0][1] == "random numbers") == (start not in PACKAGED)


def test_every_model_and_data_set_that_is_fetched_has_its_terms() -> None:
    models = {name for row in section("Models that are fetched") for name in _names(row[0])}
    assert models == {*PACKAGED, imagenet.RESNET50.name, imagenet.EFFICIENTNET_LITE0.name}
    terms = {name: row[2] for row in section("Data that are fetched") for name in _names(row[0])}
    fetched = {path.stem.removesuffix("_corpus") for path in (ROOT / "conf" / "data").glob("*.yaml")} - GIVEN
    assert fetched == terms.keys() and all(terms.values())


def _names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)
