"""Read the docstrings of the package: a line that opens with an argument's name becomes an entry of a list."""

import re
from typing import Any

from sphinx.application import Sphinx

# ``name``: text, ``name`` and ``other``, in (0, 1): text
ENTRY = re.compile(r"((?:``[^`]+``(?:,? and |, )?)+(?:[^`:]*)): (\S.*)")


def entries(lines: list[str]) -> list[str]:
    """Turn the entries ``name: text`` of a docstring into a definition list, and leave all other lines as they are.

    An entry opens at the margin and runs to the next entry, to the next empty line, or to what is raised.
    """
    made: list[str] = []
    inside = False
    for line in lines:
        found = ENTRY.fullmatch(line)
        if found:
            made += ["", found[1], f"    {found[2]}"]
            inside = True
        elif inside and line.strip() and not line.startswith("Raises "):
            made.append(f"    {line.strip()}")
        else:
            made += [""] if inside and line.strip() else []
            made.append(line)
            inside = False
    return made


def _process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = entries(lines)


def _signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    # What dataclasses write for a default that is made anew is no Python, so that Sphinx could not read the signature.
    return signature and signature.replace("<factory>", "..."), returned


def _skip(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    foreign = not str(getattr(obj, "__module__", None) or "spectrim").startswith("spectrim")
    empty = str(getattr(obj, "__doc__", "")).startswith("Alias for field number")  # of a NamedTuple
    return True if foreign or empty else None


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", _process)
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-skip-member", _skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
