"""The index of tables and figures: every grid belongs to one, and what it says is what the artefacts were made of."""

import csv
import json
import subprocess
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import pytest

from spectrim.runs import configuration

ROOT = Path(__file__).parents[2]
UNRUN = {  # no records yet
    "table3/minilm/joint_pivoted",
    "figure4/resnet20/sensitivity_pivoted",
}
APART = {"smoke", "imagenet/table2", "imagenet/table2_packaged", *UNRUN}  # grids of no committed table


@pytest.fixture(scope="module")
def grids(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("grids")


def test_every_table_and_figure_has_a_script_and_a_result(grids: ModuleType) -> None:
    for name in grids.read():
        assert (ROOT / "experiments" / f"{name}.py").is_file()
        assert (ROOT / "results" / "tables" / f"{name}.csv").is_file()
    built = {path.stem for path in (ROOT / "results" / "tables").glob("*.csv")}
    assert set(grids.read()) == {name for name in built if "_" not in name}


def test_every_grid_belongs_to_a_table_or_figure_once(grids: ModuleType) -> None:
    own = [grid for entry in grids.read().values() for kind in grids.KINDS for grid in listed(grids, entry, kind)]
    for name in grids.read():
        found = grids.grids(name)
        assert found and len(set(found)) == len(found)
    assert set(own) == set(configuration.experiments()) - APART


def listed(grids: ModuleType, entry: dict[str, list[str]], kind: str) -> list[str]:
    """The grids that an entry of the index names itself."""
    return [grid for text in entry.get(kind, []) for grid in grids.expanded(text)]


def test_an_artefact_was_made_of_the_records_of_its_grids(grids: ModuleType) -> None:
    for name in grids.read():
        read = json.loads((ROOT / "results" / "tables" / f"{name}.provenance.json").read_text())["records"]
        assert {one.partition("/")[0] for one in read} == {grid.partition("/")[0] for grid in grids.grids(name)}


def test_every_claim_is_judged_somewhere(grids: ModuleType) -> None:
    with (ROOT / "experiments" / "published.csv").open(encoding="utf-8") as stream:
        claims = {row["claim"] for row in csv.DictReader(stream)}
    patterns = [pattern for entry in grids.read().values() for pattern in entry.get("claims", [])]
    assert all(any(fnmatch(claim, pattern) for pattern in patterns) for claim in claims)
    assert all(any(fnmatch(claim, pattern) for claim in claims) for pattern in patterns)


def test_braces_are_expanded_as_a_shell_does(grids: ModuleType) -> None:
    assert grids.expanded("a/{b,c}/d{,_e}") == ["a/b/d", "a/b/d_e", "a/c/d", "a/c/d_e"]
    assert grids.expanded("figure2") == ["figure2"]


def test_the_script_lists_what_the_makefile_runs(grids: ModuleType, capsys: pytest.CaptureFixture) -> None:
    assert grids.main(["figure4", "--long"]) == 0
    assert capsys.readouterr().out.split() == [
        "figure4/resnet20/aimet",
        "figure4/resnet20/sensitivity",
        "figure4/other_nets/joint_lossless",
    ]
    assert grids.main(["figure1"]) == 0
    assert capsys.readouterr().out.split() == [grid for grid in grids.grids("table2") if grid.startswith("table2/")]
    assert grids.main(["table9", "--long"]) == 0
    assert capsys.readouterr().out == ""
    assert grids.main([]) == 0
    assert set(capsys.readouterr().out.split()) == set(configuration.experiments()) - APART
    assert grids.main(["table10"]) == 1
    assert "index.toml has no table10; choose one of: table1 table2" in capsys.readouterr().err


def test_the_makefile_knows_the_names_of_the_index(grids: ModuleType) -> None:
    said = subprocess.run(["make", "-C", ROOT, "-s", "help"], capture_output=True, text=True, check=True).stdout
    assert said.endswith(f"NAME is one of: {' '.join(grids.read())}\n")
