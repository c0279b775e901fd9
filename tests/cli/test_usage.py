"""Help comes quickly: no torch, and no file of the configuration is read."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys
sys.argv = [{program!r}, *{words!r}]
from spectrim.cli import commands
try:
    commands.{entry}()
finally:
    print(*{{"torch", "pandas", "wandb"}} & set(sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize(("program", "entry"), [("spectrim", "compress"), ("spectrim-train", "train")])
@pytest.mark.parametrize("words", [["--help"], ["model=mlp", "-h"], ["--cfg", "job", "model=mlp"]])
def test_help_imports_no_torch(program: str, entry: str, words: list[str]) -> None:
    script = SCRIPT.format(program=program, entry=entry, words=words)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == "\n"
    if "--cfg" not in words:
        assert done.stdout.startswith(f"usage: {program} [-m] ") and "--quiet" in done.stdout
        assert all(f"\n  {group}: " in done.stdout for group in ("algorithm", "data", "model", "recipe", "experiment"))
        assert " resnet20," in done.stdout


def test_the_tab_key_completes_without_torch() -> None:
    script = SCRIPT.format(program="spectrim", entry="compress", words=["-sc", "query=bash"])
    asked = os.environ | {"COMP_LINE": "spectrim model=resne", "COMP_POINT": "20"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=asked)
    assert "model=resnet20" in done.stdout.split() and done.stderr == "\n"


def test_the_help_of_a_search_imports_no_torch() -> None:
    script = (
        "import sys\nfrom spectrim.cli import search\nsearch.parser().format_help()\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_reader_of_the_help_may_end() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        script = SCRIPT.format(program="spectrim", entry="compress", words=["--help"])
        done = subprocess.run([sys.executable, "-c", script], stdout=closed, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "\n")
