"""Own code without a fork: a configuration may name the classes of the packages that the user names, and no others."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose
from hydra.initialize import initialize_config_module

from spectrim.algorithms.truncation import Truncation
from spectrim.errors import UserError
from spectrim.records import records
from spectrim.runs import configuration, targets

CODE = """
import os
class Mine:
    def __init__(self, rank):
        self.rank = rank
class _Hidden: ...
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package of the user that can be imported."""
    (tmp_path / "plug_in").mkdir()
    (tmp_path / "plug_in" / "__init__.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    targets._installed.cache_clear()
    yield "plug_in"
    sys.modules.pop("plug_in", None)
    targets._installed.cache_clear()


def test_a_named_package_is_allowed_and_nothing_else_is(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mine: dict[str, Any] = {"_target_": f"{package}.Mine", "rank": 3}
    with pytest.raises(
        UserError, match=f"_target_={package}.Mine is refused: only spectrim, .* SPECTRIM_PLUGINS names"
    ):
        targets.build(mine)
    assert package not in sys.modules
    monkeypatch.setenv(targets.PLUGINS, f"other, {package}")
    assert targets.build(mine).rank == 3
    with pytest.raises(UserError, match="os.getcwd is refused: it belongs to posix"):
        targets.build({"_target_": f"{package}.os.getcwd"})
    with pytest.raises(UserError, match="_Hidden is refused: it is no part of a run"):
        targets.build({"_target_": f"{package}._Hidden"})
    with pytest.raises(UserError, match="_target_=os.getcwd is refused"):
        targets.build({"_target_": "os.getcwd"})
    with pytest.raises(UserError, match=f"_target_={package}s.Mine is refused"):
        targets.build({"_target_": f"{package}s.Mine"})
    with pytest.raises(UserError, match="_target_=other.Mine cannot be found: No module named 'other'"):
        targets.build({"_target_": "other.Mine"})


def test_an_installed_package_may_say_so_itself(package: str, tmp_path: Path) -> None:
    folder = tmp_path / f"{package}-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[{targets.GROUP}]\nany = {package}\n")
    assert package in targets.plugins()
    assert targets.build({"_target_": f"{package}.Mine", "rank": 3}).rank == 3


@pytest.mark.parametrize("name", ["os", "importlib.util", "spectrim.cli", "torch", "a b", "my-pkg", "."])
def test_a_name_that_is_none_of_a_package_of_the_user_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(targets.PLUGINS, name)
    with pytest.raises(UserError, match=f"^SPECTRIM_PLUGINS={name} is "):
        targets.check_targets({"_target_": "spectrim.models.small.MLP"})


def test_a_class_of_the_user_is_not_signed_as_the_one_of_ours_that_has_its_name() -> None:
    ours, mine = (records.identity({"_target_": f"{home}.Joint", "x": 1}) for home in ("spectrim.algorithms", "mypkg"))
    assert (ours[records.CLASS], mine[records.CLASS]) == ("Joint", "mypkg.Joint")
    assert records.signature(ours) != records.signature(mine)


OTHER = """
import os

from hydra import compose, initialize_config_dir
from spectrim.runs import configuration, targets

with initialize_config_dir(os.getcwd(), version_base="1.3"):
    cfg = compose("app", ["algorithm.ratio=0.25"])
print(type(targets.build(configuration.plain(cfg.model))).__name__, cfg.algorithm.ratio)
"""


def test_the_configuration_is_a_package_that_another_application_composes_from(tmp_path: Path) -> None:
    with initialize_config_module("spectrim.conf", version_base="1.3"):
        cfg = compose("config", ["model=mlp", "data=digits", "algorithm=truncation"])
        assert isinstance(targets.build(configuration.plain(cfg.algorithm)), Truncation)
    groups = "[data: digits, model: mlp, algorithm: truncation, _self_]"
    (tmp_path / "app.yaml").write_text(f"defaults: {groups}\nhydra: {{searchpath: ['pkg://spectrim.conf']}}\n")
    (tmp_path / "app.py").write_text(OTHER)  # a process of its own, in which no command of ours has run
    done = subprocess.run([sys.executable, "app.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "MLP 0.25\n"), done.stderr


def test_files_beside_an_installation_are_not_taken_for_ours(tmp_path: Path) -> None:
    source = Path(configuration.__file__).parents[1]
    installed = tmp_path / "src" / "spectrim"
    shutil.copytree(source, installed, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "requirements.lock").touch()
    (tmp_path / ".git").mkdir()
    script = (
        "from spectrim.runs.configuration import CONF; from spectrim.records.provenance import git_state, lock_digest\n"
        "print(CONF, lock_digest(), *git_state())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": f"{tmp_path}/src"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(installed / "conf"), "unknown", "unknown", "False"]
