"""Fetch files from a web address or a package registry, and check them by sha256.

A download is bounded in bytes and in seconds. A file whose content differs from the pinned digest is deleted.
"""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from tqdm import tqdm

from spectrim.tools import digests

SCHEMES = ("https", "file")
LOOPBACK = ("127.0.0.1", "localhost", "::1")  # a server of this machine, whose http nobody can alter on the way
PATIENCE_SECONDS = 60.0  # for any download, in addition to the time that its size takes at the slowest rate
SLOWEST_RATE = 50_000.0  # bytes per second
# A client may keep the file twice and beside it the lists of its registry.
CLIENT_BYTES = 1 << 29
POLL_SECONDS = 0.2
GET = Path(__file__).with_name("get.py")


class Unavailable(Exception):
    """A file cannot be fetched in this way; the message gives the reason."""


class Download(ABC):
    """A file that another program downloads into a folder.

    ``file``: name of the file on disk.
    ``sha256``: all 64 hex digits; None where the caller checks the content.
    ``size``: size in bytes, which bounds the download.
    """

    file: str
    sha256: str | None
    size: int

    @property
    @abstractmethod
    def origin(self) -> str:
        """Where the file comes from: an address or a command."""

    @property
    def by_hand(self) -> str:
        """What a person does to get the file on another machine."""
        return f"{self.file} from {self.origin}"

    @abstractmethod
    def download(self, work: Path, bar: "tqdm") -> str:
        """Download the file into ``work``. Return why that failed, empty on success."""

    def fetch(self, folder: Path) -> Path:
        """Download the file into ``folder`` and return its path.

        Raises ``Unavailable`` where the download fails, exceeds its bounds or has other content, and ``OSError`` where
        the disk is full.
        """
        work = folder / f"{self.file}-work"
        work.mkdir()
        try:
            with tqdm(total=self.size, desc=self.file, unit="B", unit_scale=True, disable=None) as bar:
                failure = self.download(work, bar)
            if failure:
                raise Unavailable(f"{self.origin} failed ({failure})")
            if not (work / self.file).is_file():
                raise Unavailable(f"{self.origin} did not leave {self.file}")
            return self._checked((work / self.file).replace(folder / self.file))
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _checked(self, path: Path) -> Path:
        if self.sha256 is None:
            return path
        found = digests.of_file(path)
        if found == self.sha256:
            return path
        path.unlink()
        raise Unavailable(f"{path.name} arrived truncated or altered (its sha256 is {found}) and was deleted")

    def _run(self, command: Sequence[str], work: Path, bar: "tqdm", most: int) -> str:
        """Run a program in ``work`` until it ends or exceeds its bounds. Return why it failed, empty on success.

        ``most``: number of bytes that it may write.
        Raises ``OSError`` where the disk is full.
        """
        seconds = PATIENCE_SECONDS + self.size / SLOWEST_RATE
        end = time.monotonic() + seconds
        with subprocess.Popen(
            command,
            cwd=work,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that programs which it starts end with it
        ) as process:
            try:
                while True:
                    try:
                        output, _ = process.communicate(timeout=POLL_SECONDS)
                        break
                    except subprocess.TimeoutExpired:
                        written = _folder_bytes(work)
                    bar.update(max(0, min(written, self.size) - bar.n))
                    if written > most:
                        return f"it wrote more than {most} bytes and was ended"
                    if time.monotonic() > end:
                        return f"it took longer than {seconds:.0f} seconds and was ended"
            finally:
                if process.returncode is None:
                    os.killpg(process.pid, signal.SIGKILL)
        text = output.decode(errors="replace")
        if process.returncode and any(sign in text for sign in ("ENOSPC", "No space left", "Disk quota exceeded")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return _complaint(text, process.returncode) if process.returncode else ""


@dataclass(frozen=True)
class Url(Download):
    """A file at a web address, which is https. A file or a server of this machine is taken too."""

    address: str
    sha256: str | None
    size: int

    @property
    def file(self) -> str:  # type: ignore[override] # read-only, as is every field of a frozen class
        return self.address.rpartition("/")[2]

    @property
    def origin(self) -> str:
        return self.address

    def download(self, work: Path, bar: "tqdm") -> str:
        parts = urlsplit(self.address)
        if parts.scheme not in SCHEMES and not (parts.scheme == "http" and parts.hostname in LOOPBACK):
            return "only https is fetched"
        # -I: nothing in the user's folders or variables changes what the process imports.
        command = (sys.executable, "-I", str(GET), self.address, self.file, str(self.size))
        return self._run(command, work, bar, self.size)


@dataclass(frozen=True)
class Package(Download):
    """A package file that the registry's own client downloads. It is not installed, and none of its code runs.

    ``file``: the name that the client gives the file.
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
    def origin(self) -> str:
        return f"`{' '.join(self.command)}`"

    def download(self, work: Path, bar: "tqdm") -> str:
        executable = shutil.which(self.command[0])
        if executable is None:
            return f"{self.client} is not installed"
        command = (executable, *self.command[1:])
        if self.client == "npm":
            # A cache in our own folder lets the bar follow its size and leaves the user's cache unchanged.
            flags = ("--ignore-scripts", "--loglevel=error", "--fetch-retries=1", "--fetch-retry-mintimeout=1000")
            return self._client((*command, *flags, "--cache", str(work / "cache")), work, bar)
        if self.client == "apt-get":
            return self._client(command, work, bar) and self._with_own_lists(command, work, bar)
        return self._client((*command, "--quiet", "--disable-pip-version-check"), work, bar)

    def _client(self, command: Sequence[str], work: Path, bar: "tqdm") -> str:
        return self._run(command, work, bar, 2 * self.size + CLIENT_BYTES)

    def _with_own_lists(self, command: Sequence[str], work: Path, bar: "tqdm") -> str:
        """Retry with freshly fetched package lists, in case the machine's are missing or stale. This needs no root."""
        for part in ("state/lists/partial", "cache/archives/partial"):
            (work / part).mkdir(parents=True, exist_ok=True)
        places = (f"Dir::State={work}/state", f"Dir::Cache={work}/cache", "Dir::State::status=/var/lib/dpkg/status")
        own = [word for place in places for word in ("-o", place)]
        update, retry = (command[0], *own, "update"), (command[0], *own, *command[1:])
        return self._client(update, work, bar) or self._client(retry, work, bar)


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
