"""The sha256 of files."""

import hashlib
import re
from pathlib import Path

from spectrim.errors import UserError


def of_file(path: Path) -> str:
    """Return the sha256 of a file in hex digits. The file is read in blocks.

    Raises ``UserError`` where the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def require(path: Path, sha256: str) -> None:
    """Raise ``UserError`` unless the file at ``path`` has this sha256, which is given in all of its 64 hex digits."""
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise UserError(f"sha256={sha256!r} is not a sha256; give all 64 hex digits, in lower case")
    found = of_file(path)
    if found != sha256:
        raise UserError(f"{path} has another sha256 than the one given: {found}; fetch the file again")
