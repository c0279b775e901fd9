"""List the grids of a table or figure: ``python experiments/grids.py table5 --quick``.

``index.toml`` says what each table and figure is made of. This script reads it for the Makefile.
"""

import argparse
import re
import sys
import tomllib
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

INDEX = Path(__file__).with_name("index.toml")
KINDS = ("quick", "long")


def read() -> dict[str, dict[str, list[str]]]:
    """Return the index: the lists of each table and figure, by its name."""
    return tomllib.loads(INDEX.read_text(encoding="utf-8"))


def grids(name: str, kinds: Sequence[str] = KINDS) -> list[str]:
    """Return the grids of a table or figure, its own before those that it shares.

    ``kinds``: ``quick``, ``long`` or both.
    """
    index = read()
    places = [index[name], *(index[other] for other in index[name].get("grids_of", []))]
    return [grid for kind in kinds for place in places for text in place.get(kind, []) for grid in expanded(text)]


def expanded(text: str) -> list[str]:
    """Expand braces as a shell does: ``a/{b,c}`` gives ``a/b`` and ``a/c``."""
    found = re.search(r"\{([^{}]*)\}", text)
    if not found:
        return [text]
    before, after = text[: found.start()], text[found.end() :]
    return list(chain.from_iterable(expanded(before + choice + after) for choice in found[1].split(",")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the grids, one a line. Return the exit status."""
    parser = argparse.ArgumentParser(description="List the grids of a table or figure.")
    parser.add_argument("name", nargs="?", help="such as table5 or figure4 (default: all of them)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--quick", action="store_true", help="only those that `make reproduce-NAME` runs")
    kind.add_argument("--long", action="store_true", help="only those that take hours")
    options = parser.parse_args(arguments)
    index = read()
    if options.name and options.name not in index:
        print(f"error: {INDEX.name} has no {options.name}; choose one of: {' '.join(index)}", file=sys.stderr)
        return 1
    names = [options.name] if options.name else list(index)
    kinds = [one for one in KINDS if getattr(options, one)] or KINDS
    found = dict.fromkeys(grid for name in names for grid in grids(name, kinds))
    for grid in found if options.name else sorted(found):
        print(grid)
    return 0


if __name__ == "__main__":
    sys.exit(main())
