"""A report of three tables, out of the committed results."""

from pathlib import Path

import pytest

from spectrim.report.site.build import build

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "report"
    build(ROOT / "results", folder, ["table2_claims", "table8_selection", "figure2"])
    return folder
