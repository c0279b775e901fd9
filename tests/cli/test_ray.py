"""A grid on a Ray cluster of this machine: a worker is killed, and the numbers stay those of one process."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from spectrim.runs import configuration

pytestmark = pytest.mark.skipif(
    find_spec("hydra_plugins.hydra_ray_launcher") is None or find_spec("ray") is None,
    reason="needs Ray (pip install 'spectrim[ray]')",
)
SOURCE = str(Path(configuration.__file__).parents[2])
# The large grid takes some minutes on two cores: SPECTRIM_LONG_TESTS=1.
RATIOS, SEEDS = (10, 4) if os.environ.get("SPECTRIM_LONG_TESTS") else (3, 2)
ON_RAY = ("hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2")


def test_a_grid_survives_the_death_of_a_worker_and_gives_the_same_numbers(
    small_grid: Any, until: Any, tmp_path: Path
) -> None:
    there = {"env": os.environ | {"PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}, "cwd": tmp_path}
    alone, spread = small_grid(tmp_path / "alone", RATIOS, SEEDS), small_grid(tmp_path / "spread", RATIOS, SEEDS)
    assert alone.run(**there).returncode == 0
    started = spread.start(*ON_RAY, **there)
    until(spread.kill_one, 300)
    _, err = started.communicate(timeout=1200)
    assert started.returncode == 0, err
    assert spread.numbers() == alone.numbers() and len(alone.numbers()) == alone.size
