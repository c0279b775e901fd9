"""The lock files: every package that an installation takes is pinned, and every file has a sha256."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HASHED = ("requirements.lock", "requirements-language.lock", "requirements-rivals.lock", "requirements-zoo.lock")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
PIN = re.compile(r"([a-z0-9-]+)==([A-Za-z0-9.]+)")


def entries(name: str) -> dict[str, tuple[str, list[str]]]:
    """The version and the hashes of each package in the lock file ``name``. Fails where a line is anything else."""
    found = {}
    text = re.sub(r"^#.*\n", "", (ROOT / name).read_text(), flags=re.MULTILINE).replace(" \\\n", "")
    for line in text.splitlines():
        pin, *hashes = line.split()
        package, version = PIN.fullmatch(pin.lower()).groups()  # type: ignore[union-attr]
        assert package not in found
        found[package] = version, hashes
    return found


def normal(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[<>=\[]", requirement)[0]).lower()


@pytest.mark.parametrize("name", HASHED)
def test_every_pinned_package_has_hashes(name: str) -> None:
    for package, (_, hashes) in entries(name).items():
        assert hashes, package
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", one) for one in hashes), package


def test_torch_alone_has_no_hash() -> None:
    assert entries("requirements-torch.lock") == {"torch": ("2.13.0", []), "torchvision": ("0.28.0", [])}
    assert not {"torch", "torchvision"} & {package for name in HASHED for package in entries(name)}


def test_the_lock_pins_all_that_the_environment_is_asked_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    parts = ("dev", "docs", "cluster", "search", "tracking", "tucker")
    wanted = {normal(line) for line in [*project["dependencies"], *(line for part in parts for line in EXTRAS[part])]}
    assert wanted - {"spectrim", "torch", "torchvision"} <= entries("requirements.lock").keys()


@pytest.mark.parametrize("extra", ["language", "rivals", "zoo"])
def test_the_lock_of_an_extra_pins_its_versions_and_repeats_nothing(extra: str) -> None:
    lock = entries(f"requirements-{extra}.lock")
    pins = {f"{package}=={version}" for package, (version, _) in lock.items()}
    assert {line.lower() for line in EXTRAS[extra]} <= pins
    assert not lock.keys() & entries("requirements.lock").keys()
