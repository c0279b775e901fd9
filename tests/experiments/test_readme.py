"""The tables in the README are those of results/."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_readme_shows_what_results_hold() -> None:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "experiments/readme.py")
    assert spec is not None and spec.loader is not None
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.filled(text, ROOT / "results") == text
    assert "±" in text
