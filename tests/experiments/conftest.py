"""The scripts in ``experiments/`` as modules, and a folder of made-up records for them."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from spectrim.records import records
from spectrim.report import coverage

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "experiments"))  # as for a script there, which may import its neighbours


def module(path: Path) -> ModuleType:
    """A Python file as a module, whichever folder it lies in."""
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="session")
def factory() -> ModuleType:
    """The maker of made-up records."""
    return module(ROOT / "tests" / "report" / "conftest.py")


@pytest.fixture(scope="session")
def script() -> Callable[[str], ModuleType]:
    """A script by its name."""
    return lambda name: module(ROOT / "experiments" / f"{name}.py")


@pytest.fixture(scope="session")
def recorded(factory: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of all experiments."""
    folder = tmp_path_factory.mktemp("records")
    for one in factory.everything():
        records.write(folder, one)
    return folder


@pytest.fixture(scope="session", autouse=True)
def no_index() -> Iterator[None]:
    """Made-up records are of no grid, so the scripts expect no runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coverage, "INDEX", Path("no/such/index.csv"))
        yield
