"""Download one file: ``python get.py ADDRESS FILE BYTES``.

``download`` runs this in a process of its own, which it can end at a deadline. Within one process there is no deadline.
A server that sends one byte at a time restarts the timeout of its socket with each of them.
"""

import http.client
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

SILENCE_SECONDS = 10.0  # A server that sends nothing for as long is given up.
BLOCK_BYTES = 1 << 20


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follow a redirect, except from https to an unencrypted address."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        if req.type == "https" and not newurl.startswith("https:"):
            raise urllib.error.URLError(f"it redirects to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def get(address: str, path: Path, most: int) -> None:
    """Write the content of ``address`` to ``path``. Raises ``OSError`` where it has more than ``most`` bytes."""
    opener = urllib.request.build_opener(Redirects)
    with opener.open(address, timeout=SILENCE_SECONDS) as response, path.open("wb") as file:
        while block := response.read1(BLOCK_BYTES):
            if file.tell() + len(block) > most:
                raise OSError(f"it sends more than the expected {most} bytes")
            file.write(block)


def reason(error: Exception) -> str:
    """Return in one line why a download failed."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code}"
    inner = error.reason if isinstance(error, urllib.error.URLError) else error
    return " ".join(str(inner).split()) or type(inner).__name__


if __name__ == "__main__":
    try:
        get(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    except (OSError, ValueError, http.client.HTTPException) as error:
        sys.exit(reason(error))
