"""The tables in the README and in docs are those of results/."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from spectrim.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def readme() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "experiments/readme.py")
    assert spec is not None and spec.loader is not None
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    return readme


@pytest.mark.parametrize("page", ["README.md", "docs/selectors.md"])
def test_a_page_shows_what_results_hold(readme: ModuleType, page: str) -> None:
    assert set(readme.PAGES) == {"README.md", "docs/selectors.md"}
    text = (ROOT / page).read_text(encoding="utf-8")
    assert readme.filled(page, text, ROOT / "results") == text
    assert "±" in text


@pytest.mark.parametrize("marker", ["<!-- claims -->", "<!-- /claims -->"])
def test_a_marker_that_is_missing_is_named(readme: ModuleType, marker: str) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="lacks the markers <!-- claims --> and <!-- /claims -->"):
        readme.filled("README.md", text.replace(marker, ""), ROOT / "results")
