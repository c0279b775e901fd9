"""A grid launches its missing cells alone, on whatever machine; what is damaged or not told yet is no done cell."""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra.core.plugins import Plugins

from spectrim.cli import commands, progress
from spectrim.runs import composition

QUIET = ["hydra/job_logging=none", "hydra/hydra_logging=none"]  # handlers would outlive a test's streams


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The ratios of the cells that the launcher is given, a list for each call."""
    basic: Any = Plugins.instance().class_name_to_class["hydra._internal.core_plugins.basic_launcher.BasicLauncher"]
    usual, kept = basic.launch, list[list[str]]()

    def launch(self: Any, cells: Sequence[Sequence[str]], initial_job_idx: int) -> Any:
        kept.append([word.partition("ratio=")[2] for cell in cells for word in cell if "ratio=" in word])
        return usual(self, cells, initial_job_idx)

    monkeypatch.setattr(basic, "launch", launch)
    return kept


@pytest.fixture
def sweep(digits: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``sweep(ratios, words)``: run a grid over these ratios."""

    def swept(ratios: str, *words: str) -> None:
        grid = ["-m", *digits, "algorithm=truncation", f"algorithm.ratio={ratios}", f"hydra.sweep.dir={tmp_path}/hydra"]
        monkeypatch.setattr(sys, "argv", ["spectrim", *grid, *QUIET, *words])
        commands.compress()

    return swept


def test_a_grid_launches_the_missing_cells_alone(
    sweep: Any, launched: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    sweep("0.3,0.6")
    assert launched == [["0.3", "0.6"]] and "already" not in capsys.readouterr().err
    sweep("0.2,0.3,0.6,0.7")
    said = capsys.readouterr()
    assert launched[1:] == [["0.2", "0.7"]] and "spectrim: 2 of 4 cells are done already\n" in said.err
    assert said.out.startswith("[3 of 4, ") and "\n[4 of 4] " in said.out  # the done cells count, and took no time
    sweep("0.2,0.3,0.6,0.7")
    assert len(launched) == 2 and "spectrim: 4 of 4 cells are done already\n" in capsys.readouterr().err


def test_no_batch_is_launched_empty(sweep: Any, launched: list[list[str]]) -> None:
    sweep("0.3,0.6")
    sweep("0.3,0.6,0.7", "hydra.sweeper.max_batch_size=2")
    assert launched == [["0.3", "0.6"], ["0.7"]]


def test_a_damaged_record_is_launched_and_told(
    sweep: Any, launched: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep("0.3,0.6")
    for path in tmp_path.glob("runs/*.json"):
        if json.loads(path.read_text())["config"]["algorithm"]["ratio"] == 0.6:
            path.write_text("{")
    with pytest.raises(SystemExit):
        sweep("0.3,0.6")
    assert launched[1:] == [["0.6"]] and "is cut short or not JSON" in capsys.readouterr().err


def test_a_recorded_cell_is_launched_until_its_tracker_was_told(
    sweep: Any, launched: list[list[str]], tmp_path: Path
) -> None:
    sweep("0.3")
    csv = ("tracking=csv", f"tracking.dir={tmp_path}/csv")
    sweep("0.3", *csv)
    sweep("0.3", *csv)
    assert launched == [["0.3"], ["0.3"]] and len(list(tmp_path.glob("csv/*/summary.csv"))) == 1


def test_a_cell_that_a_search_asks_for_is_launched(sweep: Any, launched: list[list[str]]) -> None:
    sweep("0.3")
    with pytest.raises(SystemExit):
        sweep("0.3", "returns=loss")  # its record holds no loss of the verification split
    assert launched == [["0.3"], ["0.3"]]


def test_a_cell_of_which_a_state_is_left_is_launched_and_clears_it(
    sweep: Any, launched: list[list[str]], digits: list[str], tmp_path: Path
) -> None:
    sweep("0.3")
    (record,) = tmp_path.glob("runs/*.json")
    state = tmp_path / "unfinished" / f"{record.stem}.state.safetensors"
    state.parent.mkdir(exist_ok=True)
    state.touch()
    sweep("0.3", f"unfinished={state.parent}")
    assert len(launched) == 2 and not state.exists()


def test_a_grid_of_trainings_leaves_out_the_checkpoints_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    net = ["data=digits", "model=mlp", "model.hidden=[8]", "recipe=mlp", "recipe.epochs=1"]
    folders = [f"checkpoints={tmp_path}", f"unfinished={tmp_path}", f"hydra.sweep.dir={tmp_path}/hydra"]
    for seeds in ("0", "0,1"):
        monkeypatch.setattr(sys, "argv", ["spectrim-train", "-m", *net, *folders, f"seed={seeds}", *QUIET])
        commands.train()
    said = capsys.readouterr()
    assert "spectrim: 1 of 2 cells are done already\n" in said.err and "[2 of 2] " in said.out
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_an_unknown_setting_of_a_cell_is_one_line(sweep: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sweep("0.3", "nosuch=1,2")
    said = capsys.readouterr().err
    assert said.startswith("spectrim: ") and said.count("\n") == 1 and "nosuch" in said


def test_the_sweeper_of_hydra_is_back_after_the_command(sweep: Any) -> None:
    usual = Plugins.instantiate_sweeper
    sweep("0.3")
    assert Plugins.instantiate_sweeper is usual


def test_the_time_left_counts_the_cells_that_were_computed_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(composition.FOLDER, str(tmp_path))
    monkeypatch.setenv(composition.SWEEP, json.dumps({"cells": 10, "keys": [], "began": 0.0}))
    monkeypatch.setattr(progress, "in_grid", lambda: True)
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    progress.begin(6)
    assert json.loads(os.environ[composition.SWEEP])["began"] == 1000.0
    monkeypatch.setattr(time, "time", lambda: 1120.0)
    for number, text in enumerate(("computed", "")):  # the second one was recorded by another process meanwhile
        (tmp_path / f"finished{number:09d}").write_text(text)
    assert progress.said() == "[8 of 10, 4 min left] "  # two minutes for the one that was computed here
