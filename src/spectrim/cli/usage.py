"""The help of ``spectrim`` and ``spectrim-train``. Hydra's own would read every file of ``conf`` first."""

import sys
import textwrap
from contextlib import redirect_stdout
from pathlib import Path

import spectrim
from spectrim.cli import streams
from spectrim.runs.configuration import CONF, EXPERIMENTS, experiments

USAGE = """\
usage: {program} [-m] [GROUP=OPTION ...] [SETTING=VALUE ...] [--quiet | --verbose]

{does}

  -m, --multirun   run every combination of the values that are separated by commas: seed=0,1,2
  --quiet          print warnings and errors only
  --verbose        print what a run does, too
  --version        print the version
  --cfg job        print the composed configuration, with every setting and its value, and run nothing
  --config-dir D   look for further options in the folder D
  --hydra-help     the further options of Hydra

example: {program} {example}

groups and their options ({program} GROUP=OPTION --cfg job shows the settings of an option):
"""
DOES = {
    "spectrim": "Compress a trained network and record the result.",
    "spectrim-train": "Train a network and save its checkpoint.",
}
EXAMPLES = {
    "spectrim": "model=resnet20 data=digits algorithm=joint algorithm.params_kept=0.5",
    "spectrim-train": "model=mlp data=digits checkpoints=build/checkpoints",
}


def print_if_asked(program: str) -> None:
    """Print the help or the version and exit where the command line asks for it."""
    asked = {"-h", "--help", "--version"} & set(sys.argv[1:])
    if not asked:
        return
    streams.open_closed()
    with redirect_stdout(streams.Outlet(sys.stdout)):
        if asked == {"--version"}:
            print(f"{program} {spectrim.__version__}")
        else:
            _print(program)
    sys.exit(0)


def _print(program: str) -> None:
    print(USAGE.format(program=program, does=DOES[program], example=EXAMPLES[program]), end="")
    for group in sorted(path for path in Path(CONF).iterdir() if path.is_dir() and path.name != "experiment"):
        options = ", ".join(sorted(path.stem for path in group.glob("*.yaml")))
        if options:
            print(textwrap.fill(f"{group.name}: {options}", 118, initial_indent="  ", subsequent_indent="    "))
    print(f"  experiment: {len(experiments())} grids, such as table2/resnet20/one_shot; they lie in {EXPERIMENTS}")
