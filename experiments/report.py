"""Write the report, a static site of every table, figure and run: ``make report``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from spectrim.errors import UserError
from spectrim.report.site.build import build


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report. Return the exit status."""
    parser = argparse.ArgumentParser(description="Write a static site of every table, figure and run.")
    parser.add_argument("names", nargs="*", help="tables and figures to show, with their runs (default: all)")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of tables, figures and records")
    parser.add_argument("--out", type=Path, default=Path("build/report"), help="folder to write")
    options = parser.parse_args(arguments)
    try:
        count = build(options.results, options.out, options.names)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{count} pages; open {options.out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
