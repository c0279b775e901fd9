"""The description of the package on an index: the README, without what only the repository can show."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

PICTURE = re.compile(r"^!\[[^\]]*\]\([^)]*\)\n\n", re.MULTILINE)
# A link to a file. The address of the repository is unknown, so on an index it would lead nowhere.
RELATIVE_LINK = re.compile(r"\[([^\]]+)\]\((?!https?://|#)[^)]*\)")
COMMENT = re.compile(r"^<!-- [^>]* -->\n|<!-- [^>]* -->", re.MULTILINE)  # of a line, or around a number


def described(readme: str) -> str:
    """Return a README without its pictures and comments, and with the text alone of each link to a file."""
    return RELATIVE_LINK.sub(r"\1", COMMENT.sub("", PICTURE.sub("", readme)))


class ReadmeHook(MetadataHookInterface):
    """Hatchling calls it when it builds a wheel, or installs the package."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the field ``readme``."""
        readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": described(readme)}
