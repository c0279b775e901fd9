"""The sweep of W&B is valid, and the command that its agent would start runs and tells the metric."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from spectrim.runs import configuration

FILE = Path(__file__).resolve().parents[2] / "dashboards" / "sweep.yaml"
SOURCE = Path(configuration.__file__).parents[2]


@pytest.mark.filterwarnings("ignore")  # of W&B about its own code
def test_the_command_of_an_agent_runs_and_tells_the_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    sweep = yaml.safe_load(FILE.read_text())
    assert utils.load_sweep_config(str(FILE)) == sweep
    given = {"algorithm.samples": {"value": 250}, "algorithm.step": {"value": 0.5}}
    arguments = {"env": [], **utils.create_sweep_command_args({"args": given, "program": ""})}
    parts = [arguments.get(word[2:-1], [word]) if word.startswith("${") else [word] for word in sweep["command"]]
    program, *words = [word for part in parts for word in part]
    assert program == "spectrim" and words[-2:] == ["algorithm.samples=250", "algorithm.step=0.5"]
    offline = ["tracking.mode=offline", f"tracking.dir={tmp_path}", f"records={tmp_path / 'records'}"]
    own = {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "ofanagent"}
    command = [sys.executable, "-m", "spectrim.cli.run", *words, *offline]
    # In the checkout, where the committed checkpoint lies.
    subprocess.run(command, env=os.environ | own, cwd=FILE.parents[1], check=True, capture_output=True, timeout=300)
    (log,) = tmp_path.glob("wandb/offline-run-*-ofanagent/*.wandb")
    assert sweep["metric"]["name"].encode() in log.read_bytes()
    (record,) = tmp_path.glob("records/sweep/*.json")
    assert json.loads(record.read_text())["verification"]["loss"] > 0
