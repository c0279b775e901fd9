"""A grid by the launcher of Hydra for clusters, whose jobs are processes of this machine here."""

import os
import subprocess
import sys
from pathlib import Path

from spectrim.runs import configuration

SOURCE = str(Path(configuration.__file__).parents[2])


def test_a_grid_by_submitit_records_its_runs_and_names_the_one_that_failed(digits: list[str], tmp_path: Path) -> None:
    words = ["-m", *digits, "algorithm=truncation", "algorithm.ratio=0.4,2", "hydra/launcher=submitit_local"]
    done = subprocess.run(
        [sys.executable, "-m", "spectrim.cli.run", *words, "hydra/hydra_logging=none"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("spectrim: ratio must lie in (0, 1], got 2 (in spectrim data=digits ")
    assert done.stderr.count("\n") == 1
    (failed,) = tmp_path.glob("runs/*.failed.json")
    recorded = [path for path in tmp_path.glob("runs/*.json") if path != failed]
    assert len(recorded) == 1
