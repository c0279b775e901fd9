"""The package in ``examples/extending`` runs by the commands of its page, with nothing changed in spectrim."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from spectrim.records import records
from spectrim.runs import configuration

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "extending"
SOURCE = Path(configuration.__file__).parents[2]
MODULES = {"spectrim": "spectrim.cli.run", "spectrim-train": "spectrim.cli.train"}


def test_the_commands_of_the_page_run_the_package(tmp_path: Path) -> None:
    folder = tmp_path / "extending"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (block,) = re.findall(r"^```\n(.*?)^```$", (EXAMPLE / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    exported, *commands = [shlex.split(line) for line in block.splitlines()]
    assert exported == ["export", "PYTHONPATH=.", "SPECTRIM_PLUGINS=mypkg"] and len(commands) == 2
    environment = os.environ | {"PYTHONPATH": f".:{SOURCE}", "SPECTRIM_PLUGINS": "mypkg", "OMP_NUM_THREADS": "1"}
    for program, *words in commands:
        subprocess.run([sys.executable, "-m", MODULES[program], *words], cwd=folder, env=environment, check=True)
    found = records.read_all(folder / "build" / "records", "runs")
    assert {record["config"]["algorithm"]["error"] for record in found} == {0.3, 0.6}
    for record in found:
        classes = {record["config"][part][records.CLASS] for part in ("algorithm", "decomposer", "model", "data")}
        assert classes == {
            "mypkg.algorithm.SmallError",
            "mypkg.decomposer.ByShape",
            "mypkg.model.TwoLayers",
            "mypkg.data.Stripes",
        }
        assert record["compressed"]["params"] < record["dense"]["params"] and record["dense"]["test"]["accuracy"] > 0.9
