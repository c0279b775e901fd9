"""Records of the first schema are signed anew, and records and grids are held against each other."""

import io
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from spectrim.records import records
from spectrim.report import coverage


@pytest.fixture
def old(factory: ModuleType, tmp_path: Path) -> Path:
    """Return a record of the first schema, with the mark that a tracker was told of it."""
    config = {"algorithm": {"_target_": "spectrim.algorithms.joint.Joint", "params_kept": 0.5}, "seed": 0}
    made = next(iter(factory.everything())) | {"schema": 1, "config": config, "signature": "a" * 16}
    path = records.path_of(tmp_path, made["experiment"], made["signature"])
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(made))
    path.with_suffix(".tracked").touch()
    return path


def test_a_record_and_its_mark_take_the_new_name_once(script: Any, old: Path, capsys: pytest.CaptureFixture) -> None:
    before = json.loads(old.read_text())
    assert script("sign_anew").main([str(old.parent)]) == 0
    names = sorted(path.name for path in old.parent.iterdir())
    signature = names[0].partition(".")[0]
    assert names == [f"{signature}.json", f"{signature}.tracked"] and signature != "a" * 16
    after = records.read(old.parent / names[0])
    assert after["signature"] == signature and after["former_signature"] == "a" * 16
    assert after["config"]["algorithm"] == {"_class_": "Joint", "params_kept": 0.5}
    changed = {"schema", "signature", "former_signature", "config"}
    assert {k: v for k, v in after.items() if k not in changed} == {k: v for k, v in before.items() if k not in changed}
    assert script("sign_anew").main([str(old.parent)]) == 0
    assert capsys.readouterr().out.splitlines() == ["1 of 1 records signed anew", "0 of 1 records signed anew"]
    assert sorted(path.name for path in old.parent.iterdir()) == names


def test_a_signing_that_was_killed_goes_on(script: Any, old: Path) -> None:
    """The new file was written, the old one not yet removed. Another run under the new name is refused, and kept."""
    new = records.signed_anew(json.loads(old.read_text()))
    written = records.write(old.parents[1], new)
    assert script("sign_anew").main([str(old.parent)]) == 0
    assert sorted(path.name for path in old.parent.iterdir()) == [
        f"{new['signature']}.json",
        f"{new['signature']}.tracked",
    ]
    assert records.read(written) == new


def test_two_runs_of_one_signature_are_refused_and_both_are_kept(script: Any, old: Path) -> None:
    new = records.signed_anew(json.loads(old.read_text())) | {"predicted_change": 7.0}
    written = records.write(old.parents[1], new)
    assert script("sign_anew").main([str(old.parent)]) == 1
    assert old.exists() and records.read(written) == new


def test_the_record_beside_a_checkpoint_names_classes_alone(script: Any, tmp_path: Path) -> None:
    path = tmp_path / "net.json"
    path.write_text(json.dumps({"config": {"model": {"_target_": "spectrim.models.small.LeNet5"}}, "params": 7}))
    assert script("sign_anew").main([str(tmp_path)]) == 0
    assert json.loads(path.read_text()) == {"config": {"model": {"_class_": "LeNet5"}}, "params": 7}


def test_what_is_no_record_is_said_in_one_line(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "x.json").write_text("{")
    assert script("sign_anew").main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_that_is_not_there_is_refused_before_any_is_signed(
    script: Any, old: Path, capsys: pytest.CaptureFixture
) -> None:
    assert script("sign_anew").main([str(old.parent), str(old.parent / "nosuch")]) == 1
    assert "there is no folder" in capsys.readouterr().err and old.exists()


def test_records_and_cells_that_lack_one_another_are_named(
    script: Any, factory: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    stray = next(iter(factory.everything()))
    records.write(tmp_path, stray)
    monkeypatch.setattr("sys.stdin", io.StringIO("figure3"))
    assert script("check_records").main(["--records", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert f"{stray['experiment']}/{stray['signature']}: a record that is of no grid" in said
    assert "figure3/" in said and ": a cell of figure3 that has no record" in said


@pytest.mark.parametrize(("words", "said"), [("", "stdin names no grid"), ("figure33", "choose figure3")])
def test_no_grid_and_an_unknown_one_are_said_in_one_line_and_change_no_index(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, words: str, said: str
) -> None:
    monkeypatch.setattr(coverage, "INDEX", tmp_path / "cells.csv")
    monkeypatch.setattr("sys.stdin", io.StringIO(words))
    assert script("check_records").main(["--records", str(tmp_path), "--write"]) == 1
    found = capsys.readouterr()
    assert said in found.err and found.err.count("\n") == 1 and found.out == "" and not list(tmp_path.iterdir())


def test_the_committed_records_of_a_grid_are_met(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """One grid stands for all: ``make check-records`` composes the others, which takes minutes."""
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr(coverage, "INDEX", Path("results/index/cells.csv").resolve())
    monkeypatch.setattr("sys.stdin", io.StringIO("figure3"))
    script("check_records").main([])
    said = capsys.readouterr().out
    assert "of figure3 that has no record" not in said and "figure3/" not in said
    assert re.search(r"^([1-9]\d*) cells, \d+ records, \1 of both$", said, re.MULTILINE)
    assert "out of date" not in said
