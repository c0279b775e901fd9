"""Load the scripts in ``experiments/`` as modules, and run them on made-up records."""

import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from matplotlib.figure import Figure

from spectrim.records import records
from spectrim.report import coverage, figure

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "experiments"))  # as for a script there, which may import its neighbours


def module(path: Path) -> ModuleType:
    """Load a Python file of any folder as a module."""
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="session")
def factory() -> ModuleType:
    """Load the module that makes up records."""
    return module(ROOT / "tests" / "report" / "conftest.py")


@pytest.fixture(scope="session")
def script() -> Callable[[str], ModuleType]:
    """Load a script by its name."""
    return lambda name: module(ROOT / "experiments" / f"{name}.py")


@pytest.fixture(scope="session")
def recorded(factory: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write made-up records of all experiments into a folder."""
    return _written(factory.everything(), tmp_path_factory.mktemp("records"))


@pytest.fixture(scope="session")
def dosed(factory: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write made-up records of a decoder on several amounts of text into a folder."""
    return _written(factory.doses(), tmp_path_factory.mktemp("doses"))


def _written(made: Iterable[dict[str, Any]], folder: Path) -> Path:
    for one in made:
        records.write(folder, one)
    return folder


@pytest.fixture(scope="session")
def run(script: Callable[[str], ModuleType]) -> Callable[[str, Path, Path], dict[str, Figure]]:
    """Run a script on a folder of records into another folder. Return the figures that it saves, by their names."""
    saved = figure.save

    def run(name: str, found: Path, folder: Path) -> dict[str, Figure]:
        canvases: dict[str, Figure] = {}

        def keep(canvas: Figure, name: str, *rest: Any) -> list[Path]:
            canvases[name] = canvas
            return saved(canvas, name, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(figure, "save", keep)
            assert script(name).main(["--records", str(found), "--out", str(folder)]) == 0
        return canvases

    return run


@pytest.fixture(scope="session")
def canvases() -> dict[str, Figure]:
    """Hold every figure that ``built`` has saved, by its name."""
    return {}


@pytest.fixture(scope="session")
def built(
    run: Callable[[str, Path, Path], dict[str, Figure]],
    recorded: Path,
    dosed: Path,
    canvases: dict[str, Figure],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """Build a table or figure from ``recorded``, or Figure 9 from ``dosed``, once, and return its folder."""

    @cache
    def build(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        canvases.update(run(name, dosed if name == "figure9" else recorded, folder))
        return folder

    return build


@pytest.fixture(scope="session", autouse=True)
def no_index() -> Iterator[None]:
    """Let the scripts expect no runs, because made-up records belong to no grid."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coverage, "INDEX", Path("no/such/index.csv"))
        yield
