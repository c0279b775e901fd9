"""What the commands print: results on stdout, all else on stderr, as much as ``--quiet`` and ``--verbose`` ask for."""

import argparse
import logging
import os
import sys
from typing import Any, NoReturn, Self

import spectrim
from spectrim.tools import spelling

LOG = logging.getLogger("spectrim.cli")
RESULTS = logging.getLogger("spectrim.cli.results")
OPTIONS = {"--quiet": "WARNING", "--verbose": "DEBUG"}
SILENT = ("hydra/hydra_logging=none", "hydra/job_logging=none")  # Hydra prints a line a run
# Environment variable: the level of the messages, for the processes of a grid.
LEVEL = "SPECTRIM_LOG_LEVEL"


class _Console(logging.Handler):
    """Print to the stream that ``sys`` holds at this moment, because a test or a progress bar may replace it."""

    def __init__(self, stream: str, prefix: str = "") -> None:
        super().__init__()
        self.stream, self.prefix = stream, prefix

    def emit(self, record: logging.LogRecord) -> None:
        print(f"{self.prefix}{record.getMessage()}", file=getattr(sys, self.stream))


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are told in one line."""

    def with_version(self) -> Self:
        """Add the option ``--version``."""
        self.add_argument("--version", action="version", version=f"%(prog)s {spectrim.__version__}")
        return self

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse ``args``. A misspelt option is told first: argparse would rather miss the one that was meant."""
        words = sys.argv[1:] if args is None else list(args)
        # Some options may be those of another command, which this one calls.
        elsewhere = self._subparsers or any(own.nargs == argparse.REMAINDER for own in self._actions)
        mistake = "" if elsewhere else spelling.misspelt(words, self._option_string_actions)
        if mistake:
            self.error(mistake)
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help lists all options\n")


def take_options() -> None:
    """Remove ``--quiet`` and ``--verbose`` from the command line, which Hydra does not know, and obey them."""
    for option in [word for word in sys.argv[1:] if word in OPTIONS]:
        os.environ[LEVEL] = OPTIONS[option]
        sys.argv.remove(option)
    if os.environ.get(LEVEL) == OPTIONS["--quiet"]:
        sys.argv += [none for none in SILENT if not any(word.startswith(none.partition("=")[0]) for word in sys.argv)]
    configure()


def configure() -> None:
    """Send the messages of this process to the console, at the level of the command that started it."""
    LOG.setLevel(os.environ.get(LEVEL, "INFO"))
    for logger, console in ((LOG, _Console("stderr", "spectrim: ")), (RESULTS, _Console("stdout"))):
        logger.handlers, logger.propagate = [console], False
