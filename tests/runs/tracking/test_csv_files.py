"""Tracking in csv files."""

import csv
import json
from pathlib import Path

import pandas as pd

from spectrim.runs.tracking.csv_files import Csv
from spectrim.runs.tracking.session import About, Results

ABOUT = About("0123456789abcdef", "mlp-digits", "table2", "lossless", ("mlp",), {"seed": 0})


def rows(path: Path) -> list[list[str]]:
    return list(csv.reader(path.read_text().splitlines()))


def test_the_log_grows_while_the_run_goes_on_and_the_results_come_at_the_end(tmp_path: Path) -> None:
    session, folder = Csv(dir=str(tmp_path)).start(ABOUT), tmp_path / ABOUT.signature
    session.log({"loss": 0.5, "epoch": 3}, "epoch")
    (head, row) = rows(folder / "log.csv")
    assert head == ["time", "axis", "at", "name", "value"] and row[1:] == ["epoch", "3", "loss", "0.5"]
    assert json.loads((folder / "run.json").read_text())["status"] == "running"
    session.finish(Results([], {"test/loss": 1.5}, {"layers": pd.DataFrame({"rank": [3]})}, {"record.json": b"{}"}), 0)
    assert rows(folder / "summary.csv") == [["name", "value"], ["test/loss", "1.5"]]
    assert rows(folder / "layers.csv") == [["rank"], ["3"]] and (folder / "record.json").read_bytes() == b"{}"
    told = json.loads((folder / "run.json").read_text())
    assert told["status"] == "finished" and told["settings"] == {"seed": 0}


def test_a_run_that_fails_leaves_its_exit_status(tmp_path: Path) -> None:
    Csv(dir=str(tmp_path)).start(ABOUT).finish(None, 143)
    assert json.loads((tmp_path / ABOUT.signature / "run.json").read_text())["status"] == "failed with status 143"
