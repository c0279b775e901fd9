"""The house as a whole: every module is importable, imports point downward, no file says what it should not."""

import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import spectrim

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(module.name for module in pkgutil.walk_packages(spectrim.__path__, "spectrim."))

# Hosts that a person reaches through a client that has them already, and words that only somebody's own machine knows.
# In pieces, so that this file does not hold them itself.
FORBIDDEN = re.compile(
    "|".join(
        (r"py" r"pi\.org", r"files\.python" r"hosted", r"registry\.np" r"mjs", r"deb\.deb" r"ian\.org", r"/ro" r"ot/")
    )
)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_is_importable(name: str) -> None:
    importlib.import_module(name)


def test_every_name_at_the_top_is_there() -> None:
    assert all(getattr(spectrim, name) is not None for name in spectrim.__all__)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = spectrim.nothing_of_the_kind
    assert {*spectrim.__all__, "language", "__version__"} <= set(dir(spectrim))


def modules_after(imports: str) -> set[str]:
    """The modules that a fresh interpreter holds after ``import imports``."""
    command = [sys.executable, "-c", f"import sys, {imports}; print(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize(
    "light", ["spectrim", "spectrim.records.records", "spectrim.records.provenance", "spectrim.report.command"]
)
def test_reports_do_not_load_torch(light: str) -> None:
    assert not modules_after(light) & {"torch", "torchvision", "hydra", "wandb"}


def test_the_runner_does_not_load_tracking_services() -> None:
    assert "wandb" not in modules_after("spectrim.cli.run")


def test_the_layers_of_the_imports_are_kept() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_each_module_has_its_layer() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    placed = {name.strip() for layer in contracts[0]["layers"] for name in re.split("[|:]", layer)}
    assert placed == {name.split(".")[1] for name in MODULES} - {"conf", "__main__"}  # yaml alone; above all


def committed() -> list[Path]:
    """The text files of the project: what git tracks or would, in an unpacked archive whatever lies there."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    if (ROOT / ".git").exists():
        names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    else:
        names = [os.path.relpath(path, ROOT) for path in ROOT.glob("[a-zA-Z.]*/**/*") if "/." not in str(path)]
    kinds = {".py", ".yaml", ".toml", ".md", ".lock", ".cff", ".json", ".csv", ".tex", ".ipynb", ""}
    return [ROOT / name for name in names if Path(name).suffix in kinds and (ROOT / name).is_file()]


def test_no_file_names_a_registry_or_a_machine() -> None:
    files = committed()
    assert len(files) > 50
    found = [f"{path.relative_to(ROOT)}: {hit[0]}" for path in files if (hit := FORBIDDEN.search(path.read_text()))]
    assert not found
