"""Import packages that only some features need."""

from importlib import import_module
from typing import Any

from spectrim.errors import UserError, first_line

# The target of make that installs an extra in a checkout, where there is one.
TARGETS = {"language": "install-language", "search": "install", "tracking": "install", "tucker": "install"}


def imported(package: str, extra: str, user: str) -> Any:
    """Import and return an optional package.

    ``extra``: the extra of spectrim that installs it.
    ``user``: the feature that needs it, as the subject of a sentence.

    Raises ``UserError``, which names the extra, where the package is missing or cannot be imported.
    """
    try:
        return import_module(package)
    except ImportError as error:
        made = f", or make {TARGETS[extra]} in a checkout" if extra in TARGETS else ""
        raise UserError(
            f"{user} needs extra packages ({first_line(error)}): pip install 'spectrim[{extra}]'{made}"
        ) from None
