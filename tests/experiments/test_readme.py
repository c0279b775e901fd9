"""The tables in the README and in docs are those of results/."""

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from spectrim.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def readme(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("readme")


PAGES = {
    "README.md": {"frontier"},
    "docs/algorithms.md": {"selectors"},
    "docs/results.md": {"claims", "table2", "frontier", "language", "checkpoints"},
    "docs/supported_models.md": {"zoo"},
    "docs/using_the_result.md": set(),
}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_shows_what_results_hold(readme: ModuleType, page: str) -> None:
    assert {page: set(blocks) for page, blocks in readme.PAGES.items()} == PAGES
    text = (ROOT / page).read_text(encoding="utf-8")
    assert readme.filled(page, text, ROOT / "results") == text
    assert {"docs/supported_models.md": "works", "docs/using_the_result.md": " %<!-- = -->"}.get(page, "±") in text


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_every_pair_of_markers_on_a_page_is_filled(page: str) -> None:
    markers = re.findall("^<!-- (/?)(\\w+) -->$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(name for closing, name in markers if not closing) == sorted(PAGES.get(page, ()))


def test_the_table_of_the_readme_has_at_most_ten_rows(readme: ModuleType) -> None:
    table = [
        line for line in readme.PAGES["README.md"]["frontier"](ROOT / "results").splitlines() if line.startswith("|")
    ]
    assert 0 < len(table[2:]) <= 10


def test_a_link_of_a_block_is_shortened_at_the_root(readme: ModuleType) -> None:
    empty = "<!-- frontier -->\n<!-- /frontier -->"
    shown = {"README.md": {"frontier": lambda results: "[a](../results/a.md)"}}
    readme.PAGES = {**shown, "docs/a.md": shown["README.md"]}
    assert "[a](results/a.md)" in readme.filled("README.md", empty, ROOT / "results")
    assert "[a](../results/a.md)" in readme.filled("docs/a.md", empty, ROOT / "results")


@pytest.mark.parametrize("marker", ["<!-- claims -->", "<!-- /claims -->"])
def test_a_marker_that_is_missing_is_named(readme: ModuleType, marker: str) -> None:
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="lacks the markers <!-- claims --> and <!-- /claims -->"):
        readme.filled("docs/results.md", text.replace(marker, ""), ROOT / "results")


def test_every_known_number_stands_on_a_page_and_no_other(readme: ModuleType) -> None:
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    assert set(re.findall(r"<!-- =(\w+) -->", text)) == set(readme.quoted.NUMBERS)
    assert len(re.findall(r"<!-- =\w+ -->", text)) == len(readme.NUMBER.findall(text))


def test_a_number_is_read_from_the_table(readme: ModuleType, tmp_path: Path) -> None:
    readme.PAGES = {"page.md": {}}
    text = "It is <!-- =vgg_rival -->+9.99<!-- = --> points."
    assert readme.filled("page.md", text, ROOT / "results") == "It is <!-- =vgg_rival -->+0.32<!-- = --> points."
    with pytest.raises(UserError, match=r"page\.md quotes nothing, which quoted\.py does not know"):
        readme.filled("page.md", "<!-- =nothing -->1<!-- = -->", ROOT / "results")
    with pytest.raises(UserError, match=r"cannot read .*table5\.csv"):
        readme.filled("page.md", text, tmp_path)


def test_whitened_and_plain_spectra_are_compared_at_equal_factors(readme: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    names = ("SVD, channel view", "SVD, spatial view", "SVD, better view of each layer")
    data = [
        {
            "variant": "truncation, params kept 0.5",
            "method": white + name,
            "factors": factors,
            "change_test_loss": rise * part,
        }
        for factors, rise, part_of in (("plain", 4.0, 0.5), ("pivoted", 1.0, 0.25))
        for name in names
        for white, part in (("", 1.0), ("whitened ", part_of))
    ]
    pd.DataFrame(data).to_csv(tmp_path / "tables" / "table4.csv", index=False)
    assert readme.quoted.whitened(tmp_path) == "25 to 50 %"


def test_a_row_that_is_no_longer_there_is_named(readme: ModuleType) -> None:
    with pytest.raises(UserError, match=r"table9\.csv has no row with method a new name"):
        readme.quoted.rows(ROOT / "results", "table9", method="a new name")
    with pytest.raises(UserError, match=r"table9\.csv has no column colour"):
        readme.quoted.rows(ROOT / "results", "table9", colour="red")
    span = readme.quoted.span
    assert (span(pd.Series([1.04, 0.98]), 1, " %"), span(pd.Series([1.0, 1.01]), 1)) == ("1.0 %", "1.0")
    assert span(pd.Series([2.0, -1.0]), 1, " %") == "−1.0 to 2.0 %"
