"""Verification: what is committed is what its records give, or it is named."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from spectrim.records import records


@pytest.fixture
def results(script: Callable[[str], ModuleType], factory: ModuleType, tmp_path: Path) -> Path:
    """Write the results of Table 9 as a checkout holds them."""
    for one in factory.table9():
        records.write(tmp_path / "records", one)
    assert script("table9").main(["--records", str(tmp_path / "records"), "--out", str(tmp_path)]) == 0
    return tmp_path


def verify(script: Callable[[str], ModuleType], results: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    status = script("verify").main(["table9", "--results", str(results)])
    lines = capsys.readouterr().out.splitlines()
    assert (status == 0) == (lines == ["PASS"])
    return lines


def test_what_the_records_give_passes_whatever_the_command_was(
    script: Callable[[str], ModuleType], results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(script, results, capsys) == ["PASS"]


@pytest.mark.parametrize("name", ["table9.csv", "table9.md", "table9_paper.tex"])
def test_a_file_that_was_changed_by_hand_is_named(
    name: str, script: Callable[[str], ModuleType], results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = results / "tables" / name
    path.write_bytes(path.read_bytes().replace(b"1", b"2"))
    lines = verify(script, results, capsys)
    assert lines == [f"tables/{name}: differs from what its records give", "FAIL: 1 differences"]


def test_another_record_changes_the_table_and_its_provenance(
    script: Callable[[str], ModuleType], results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sorted((results / "records/table9").glob("*.json"))[0]
    one = json.loads(path.read_text())
    one["compressed"]["test"]["loss"] += 0.5
    records.write(results / "records", one)
    lines = verify(script, results, capsys)
    assert "tables/table9.csv: differs from what its records give" in lines
    assert "tables/table9.provenance.json: differs from what its records give" in lines


def test_a_file_that_is_not_committed_or_that_no_script_makes_is_named(
    script: Callable[[str], ModuleType], results: Path, tmp_path: Path
) -> None:
    (results / "tables/table9.tex").unlink()
    (results / "tables/old.csv").write_text("x")
    built = tmp_path / "built"
    assert script("table9").main(["--records", str(results / "records"), "--out", str(built)]) == 0
    assert list(script("verify").compared(results, built, every=True)) == [
        "tables/old.csv: no script makes it",
        "tables/table9.tex: not committed",
    ]
    assert list(script("verify").compared(results, built, every=False)) == ["tables/table9.tex: not committed"]


def test_a_table_that_cannot_be_built_is_named(
    script: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = verify(script, tmp_path, capsys)
    assert lines[0].startswith("table9: cannot be built: error: no records of table9")


def test_a_page_that_was_changed_by_hand_is_named(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = script("verify")
    (tmp_path / "page.md").write_text("<!-- block -->\nold\n<!-- /block -->\n")
    monkeypatch.setattr(verify.readme, "ROOT", tmp_path)
    monkeypatch.setattr(verify.readme, "PAGES", {"page.md": {"block": lambda results: "new\n"}})
    assert list(verify.pages(tmp_path)) == ["page.md: out of date, run `make readme`"]
    (tmp_path / "page.md").write_text("nothing")
    assert "lacks the markers" in next(verify.pages(tmp_path))
