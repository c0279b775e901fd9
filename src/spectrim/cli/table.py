"""Build a table or a figure from records, in a checkout or from an installed package: ``spectrim-table NAME``."""

import argparse
import sys
import tomllib
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib import import_module

from spectrim.cli import streams
from spectrim.cli.messages import Parser
from spectrim.cli.termination import ending, terminable
from spectrim.errors import UserError
from spectrim.fetch import release
from spectrim.records.provenance import ROOT

SCRIPTS = ROOT / "experiments"


def names() -> list[str]:
    """Return the names of the tables and figures."""
    return list(tomllib.loads((SCRIPTS / "index.toml").read_text(encoding="utf-8")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of ``spectrim-table``. Return the exit status of the script."""
    streams.open_closed()
    parser = Parser(
        prog="spectrim-table",
        usage="%(prog)s NAME [--records FOLDER | --fetch [ADDRESS]] [--out FOLDER] ...",
        description="Build a table or a figure from records. Nothing is run.",
        epilog="--fetch takes the records of the release at ADDRESS, a folder or an https address; by default at "
        f"${release.ADDRESS}. `spectrim-table NAME --help` lists the other options.",
    ).with_version()
    parser.add_argument("name", metavar="NAME", choices=names(), help=", ".join(names()))
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS).required = False
    options = parser.parse_args(arguments)
    fetching = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # the script has other options
    fetching.add_argument("--fetch", metavar="ADDRESS", nargs="?", const="")
    given, rest = fetching.parse_known_args(options.rest)
    sys.path.insert(0, str(SCRIPTS))  # as for a script there, which may import its neighbours
    try:
        with terminable(), redirect_stdout(streams.Outlet(sys.stdout)):
            if given.fetch is not None:
                rest += ["--records", str(release.records(given.fetch))]
            status: int = import_module(options.name).main(rest)
            return status
    except UserError as error:
        return _said(str(error), 1)
    except KeyboardInterrupt as stop:
        word, status = ending(stop)
        return _said(f"{word}; give the same command again", status)


def _said(line: str, status: int) -> int:
    print(f"spectrim-table: {line}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
