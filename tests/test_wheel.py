"""The wheel alone: in an environment without the checkout it compresses a net and builds tables."""

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import spectrim

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "experiments" / "release.py"
NET = "resnet20-digits-seed0.safetensors"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel of this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a new environment, which sees the packages of this one. Return its folder of programs."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "running.pth").write_text(sysconfig.get_path("purelib"))  # the editable package there stays out of sight
    return python.parent


def run(programs: Path, folder: Path, *command: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "SPECTRIM"))}
    environment = {**kept, "OMP_NUM_THREADS": "1", **variables}
    program = [str(programs / command[0]), *command[1:]]
    return subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_it_holds_scripts_grids_and_types_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
        (metadata,) = (packed.read(name).decode() for name in names if name.endswith("METADATA"))
    needed = ["py.typed", "conf/config.yaml", "results/index/cells.csv", "__main__.py"]
    needed += [f"experiments/{name}" for name in ("table2.py", "published.csv", "selectors.csv", "index.toml")]
    assert {f"spectrim/{name}" for name in needed} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith(("tests/", "results/"))]
    assert f"Version: {spectrim.__version__}\n" in metadata
    core = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    heavy = ("wandb", "optuna", "greenlet", "tensorly", "transformers", "onnx", "sphinx")
    assert core and not [line for line in core if any(name in line for name in heavy)]


def test_its_page_on_an_index_shows_no_picture_and_no_link_that_the_repository_alone_has(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        (metadata,) = (packed.read(name).decode() for name in packed.namelist() if name.endswith("METADATA"))
    header, _, page = metadata.partition("\n\n")
    assert "Description-Content-Type: text/markdown" in header
    assert page.startswith("# spectrim\n") and "## Install" in page and "joint, ours, pivoted" in page
    assert "![" not in page and "<!--" not in page and not re.findall(r"\]\((?!https://)", page)
    assert "do not hold at our scale" in page  # the text of a link stays


def test_it_is_the_package_that_runs(programs: Path, tmp_path: Path) -> None:
    done = run(programs, tmp_path, "python", "-c", "import spectrim; print(spectrim.__file__)")
    assert Path(done.stdout.strip()).is_relative_to(programs.parent)
    version = f"spectrim {spectrim.__version__}\n"
    assert run(programs, tmp_path, "python", "-m", "spectrim", "--version").stdout == version
    assert {"spectrim", "spectrim-table"} <= {path.name for path in programs.iterdir()}


def test_it_makes_a_table_and_its_figures_from_records(programs: Path, tmp_path: Path) -> None:
    given = ("--records", str(ROOT / "results" / "records"))
    done = run(programs, tmp_path, "spectrim-table", "table2", *given)
    assert (done.returncode, done.stderr) == (0, "")
    for made in (tmp_path / "results" / "tables").glob("*[!n]"):  # all but the provenance, which names the command
        assert made.read_bytes() == (ROOT / "results" / "tables" / made.name).read_bytes(), made.name
    assert run(programs, tmp_path, "spectrim-table", "figure3", *given).returncode == 0
    assert (tmp_path / "results" / "figures" / "figure3.png").is_file()


def test_it_knows_which_runs_a_table_needs(programs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "records" / "table2"
    folder.mkdir(parents=True)
    for path in sorted((ROOT / "results" / "records" / "table2").glob("*.json"))[:40]:
        (folder / path.name).symlink_to(path)
    done = run(programs, tmp_path, "spectrim-table", "table2", "--records", "records")
    assert done.returncode == 1 and "runs missing; allow it by --partial" in done.stderr


def test_it_fetches_a_checkpoint_and_compresses_it(programs: Path, tmp_path: Path) -> None:
    results = tmp_path / "made" / "checkpoints"
    results.mkdir(parents=True)
    (results / NET).symlink_to(ROOT / "results" / "checkpoints" / NET)
    done = run(programs, tmp_path, "python", str(SCRIPT), "--results", "made", "--out", "released")
    assert done.returncode == 0, done.stderr
    command = ("spectrim", "model=resnet20", "data=digits", "algorithm=truncation", "algorithm.ratio=0.5")
    done = run(programs, tmp_path, *command, SPECTRIM_RELEASE="released")
    assert done.returncode == 0 and "params kept" in done.stdout, done.stderr
    (record,) = (tmp_path / "build" / "records").rglob("*.json")
    assert '"commit": "unknown"' in record.read_text()
    assert (tmp_path / "results" / "checkpoints" / NET).is_file()
