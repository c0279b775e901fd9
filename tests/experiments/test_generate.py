"""Text of a compressed model, and how fast it is written beside the dense one."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import spectrim

Script = Callable[[str], ModuleType]


def test_the_script_writes_text_and_says_how_fast(
    word_folder: Any, tmp_path: Path, script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    spectrim.compress_checkpoint(word_folder, tmp_path / "small", ratio=0.5)
    generate = script("generate")
    given = [str(tmp_path / "small"), "w3 w4", "--tokens", "3", "--rounds", "1"]
    assert generate.main([*given, "--dense", str(word_folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("compressed, ") and "parameters: w3 w4" in lines[0] and lines[1].startswith("dense, ")
    assert "tokens a second at batch size 1" in lines[2] and lines[-1].startswith("compressed over dense: ")
    assert generate.main(given) == 0
    assert "over dense" not in capsys.readouterr().out


@pytest.mark.parametrize("given", [["nothing"], ["nothing", "--tokens", "0"]])
def test_what_cannot_be_is_said_in_one_line(given: list[str], script: Script, capsys: Any, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    assert script("generate").main([str(tmp_path / given[0]), *given[1:]]) == 1
    assert capsys.readouterr().err.count("\n") == 1
