"""Keep a run going where nobody reads what it prints."""

import os
import sys
from typing import Any, TextIO


def open_closed() -> None:
    """Open what the shell has closed, as by ``2>&-``. The next file would take its number and get what is printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)  # A worker without it does not start.
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


class Outlet:
    """A stream that falls silent when its reader ends: ``spectrim ... | head -1`` must not cost a run."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
            self.stream.flush()
        except BrokenPipeError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())  # Python writes the rest when it ends, and would complain.
            os.close(null)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
