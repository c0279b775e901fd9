"""The page on the architecture tells of the floors of the import contract, and modules keep to the house rules."""

import re
import runpy
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_floors_of_the_page_are_those_of_the_contract() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    floors = [set(re.findall(r"\w+", floor)) for floor in contract["layers"]]
    rows: dict[int, set[str]] = {}
    for number, folders in re.findall(r"^\| (\d+) \| (.*?) \|", (ROOT / "docs" / "architecture.md").read_text(), re.M):
        rows.setdefault(int(number), set()).update(re.findall(r"`(\w+)`", folders))
    assert [rows[number] for number in sorted(rows, reverse=True)] == floors


def test_the_package_has_at_most_twelve_modules_at_its_root_and_no_file_above_300_lines() -> None:
    source = ROOT / "src" / "spectrim"
    assert len(list(source.glob("*.py"))) <= 12
    assert [str(path) for path in source.rglob("*.py") if len(path.read_text().splitlines()) > 300] == []


def test_the_picture_is_the_one_that_its_script_draws() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "draw_architecture.py"))
    assert (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8") == script["drawn"]()


def test_hooks_are_registered_by_the_one_form_that_passes_over_the_calls_of_other_threads() -> None:
    source = ROOT / "src" / "spectrim"
    places = [path for path in source.rglob("*.py") if re.search(r"register_(module_)?forward", path.read_text())]
    assert places == [source / "tools" / "hooks.py"]
