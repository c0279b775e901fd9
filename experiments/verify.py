"""Rebuild every committed table, figure and page from the records, and compare them byte for byte: ``make verify``.

Everything is built into a temporary folder. The last line is PASS, or else each file that differs has a line of its own
and the exit status is 1. Of a provenance file, the command and the state of the checkout are not compared.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import grids
import readme
from tqdm import tqdm

from spectrim.errors import UserError

OF_THE_BUILD = ("command", "commit", "dirty")  # keys of a provenance file that another build may change
FOLDERS = ("tables", "figures")


def build(name: str, records: Path, out: Path) -> str:
    """Build a table or figure. Return what went wrong, or an empty string."""
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        status = import_module(name).main(["--records", str(records), "--out", str(out)])
    return f"{name}: cannot be built: {said.getvalue().strip()}" if status else ""


def compared(results: Path, built: Path, every: bool) -> Iterator[str]:
    """Yield one line per file that differs, or that only one folder has.

    ``every``: whether all scripts were run, so that a committed file that was not built is a leftover.
    """
    here, there = ({path.relative_to(root) for path in _files(root)} for root in (results, built))
    for path in sorted(here | there if every else there):
        if path not in there:
            yield f"{path}: no script makes it"
        elif path not in here:
            yield f"{path}: not committed"
        elif _content(results / path) != _content(built / path):
            yield f"{path}: differs from what its records give"


def _files(root: Path) -> Iterator[Path]:
    for folder in FOLDERS:
        yield from (path for path in (root / folder).rglob("*") if path.is_file())


def _content(path: Path) -> Any:
    if not path.name.endswith(".provenance.json"):
        return path.read_bytes()
    origin = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in origin.items() if key not in OF_THE_BUILD}


def pages(results: Path) -> Iterator[str]:
    """Yield one line per page of the README and docs that does not show what ``results`` holds."""
    for page in readme.PAGES:
        text = (readme.ROOT / page).read_text(encoding="utf-8")
        try:
            if readme.filled(page, text, results) != text:
                yield f"{page}: out of date, run `make readme`"
        except UserError as error:
            yield f"{page}: {error}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script. Return its exit status."""
    parser = argparse.ArgumentParser(description="Compare committed tables, figures and pages with their records.")
    parser.add_argument("names", nargs="*", help="of tables and figures (default: all, and the pages)")
    parser.add_argument("--results", type=Path, default=readme.ROOT / "results", help="folder of what is committed")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder)
        names = options.names or list(grids.read())
        found = [build(name, options.results / "records", built) for name in tqdm(names, leave=False, disable=None)]
        found = [line for line in found if line]
        found += compared(options.results, built, every=not options.names)
        if not options.names:
            found += pages(options.results)
    for line in found:
        print(line)
    print(f"FAIL: {len(found)} differences" if found else "PASS")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
