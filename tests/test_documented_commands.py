"""Every command that the documentation, a yaml or the Makefile states composes as it stands there."""

import re
import shlex
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from spectrim.runs import configuration

ROOT = Path(__file__).resolve().parents[1]
STATED = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "Makefile",
    *sorted(Path(configuration.CONF).rglob("*.yaml")),
]
COMMAND = re.compile(r"^[# \t]*(?:[\w ]+: +)?(?:\$\(BIN\)/)?(spectrim(?:-train)? .*=.*)$")


def lines(path: Path) -> Iterator[str]:
    """The lines of a file, those that a backslash continues as one; backticks set a command apart."""
    text = re.sub(r"\\\n[#\s]*", " ", path.read_text(encoding="utf-8")).replace("$$", "$")
    for line in text.splitlines():
        yield from re.split("[`;]", line) if "'" not in line else [line]


def commands() -> Iterator[tuple[str, str]]:
    for path in STATED:
        for line in lines(path):
            found = COMMAND.match(line)
            if found and not re.search(r"\$grid|\bmine\b|NAME", line):
                yield path.name, found.group(1)


def swept(override: Override) -> list[str]:
    """The values of one override, each as an override of its own; one that is no sweep as it is."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    return [f"{override.key_or_group}={value}" for value in override.sweep_string_iterator()]


FOUND = list(dict.fromkeys(commands()))


def test_the_commands_are_found() -> None:
    assert {"README.md", "Makefile", "config.yaml", "table2.yaml", "_base.yaml", "wandb.yaml"} <= {f for f, _ in FOUND}
    assert {"experiments.md", "language_models.md", "getting_started.md", "clusters.md"} <= {f for f, _ in FOUND}
    assert sum(name == "experiments.md" for name, _ in FOUND) >= 5


@pytest.mark.parametrize(("file", "command"), FOUND, ids=[command for _, command in FOUND])
def test_it_composes(compose: Any, file: str, command: str) -> None:
    program, *words = shlex.split(command, comments=True)
    given = OverridesParser.create().parse_overrides([word for word in words if word != "-m"])
    name = "train" if program == "spectrim-train" else "config"
    for overrides in product(*(swept(one) for one in given)):
        cfg = compose(*overrides, name=name)
        assert cfg.model._target_ and cfg.data._target_


def test_the_smoke_grid_holds_every_algorithm(compose: Any) -> None:
    params = compose("experiment=smoke").hydra.sweeper.params
    there = {path.stem for path in (Path(configuration.CONF) / "algorithm").glob("*.yaml")}
    elsewhere = {"aimet"}  # runs in an environment of its own
    assert {name.strip() for name in params.algorithm.split(",")} == there - elsewhere
