"""The records and checkpoints of a release, fetched where they are not at hand and checked by their sha256.

A release is a folder, on this machine or at an https address. Its ``release.json`` lists size and sha256 of each file:
``records.zip`` and one file per checkpoint. ``make release`` makes such a folder.
"""

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectrim.errors import UserError
from spectrim.fetch.cache import cache_folder, writing
from spectrim.fetch.download import Unavailable, Url
from spectrim.tools import files

ADDRESS = "SPECTRIM_RELEASE"  # environment variable: the address of the release
INDEX, RECORDS = "release.json", "records.zip"
PIN = "#sha256="  # may end an address: the sha256 of its index
INDEX_BYTES, RECORDS_BYTES = 1 << 20, 1 << 30  # more than either has


@dataclass(frozen=True)
class Release:
    """A release at an address.

    ``place``: the address without its pin.
    ``sha256``: digest that the index must have; None where the address has no pin.
    """

    place: str
    sha256: str | None = None

    def file(self, name: str, folder: Path) -> Url:
        """Return a file that the index lists. The index is fetched into ``folder``.

        Raises ``UserError`` where the release cannot be reached or does not list the file.
        """
        index = fetched(Url(f"{self.place}/{INDEX}", self.sha256, INDEX_BYTES), folder)
        try:
            listed: dict[str, Any] = files.read_json(index)["files"]
            entry = listed.get(name)
            known = None if entry is None else (str(entry["sha256"]), int(entry["size"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{self.place}/{INDEX} is damaged: make it anew with `make release`") from None
        if known is None:
            raise UserError(f"the release {self.place} has no {name}")
        return Url(f"{self.place}/{name}", *known)


def fetched(file: Url, folder: Path) -> Path:
    """Fetch a file of a release into ``folder``. Raises ``UserError`` where it cannot be had, or has other content."""
    try:
        return file.fetch(folder)
    except Unavailable as failure:
        raise UserError(f"{file.file} could not be fetched: {failure}; check {ADDRESS} or --fetch") from None


def at(given: str = "") -> Release:
    """Return the release at an address or a folder; without one, that of the environment variable ``ADDRESS``.

    Raises ``UserError`` where neither names one.
    """
    said = given or os.environ.get(ADDRESS, "")
    place, _, sha256 = said.partition(PIN)
    if not place:
        raise UserError(f"no release is known: set {ADDRESS}, or give --fetch, the folder or https address of {INDEX}")
    if "://" not in place:
        place = Path(place).expanduser().absolute().as_uri()
    return Release(place.rstrip("/"), sha256 or None)


def records(given: str = "") -> Path:
    """Return the folder of a release's records in the user's cache; fetch and unpack them where they are not there.

    ``given``: as for ``at``.
    Raises ``UserError`` as ``Release.file`` and ``fetched`` do, and where the archive is not one of records.
    """
    release, cache = at(given), cache_folder()
    with writing(cache, RECORDS), files.scratch(cache) as work:
        archive = release.file(RECORDS, work)
        kept = cache / f"records-{archive.sha256}"
        if not kept.exists():
            with files.replacing(kept) as (made,):
                _unpack(fetched(archive, work), made)
    return kept


def _unpack(archive: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as packed:
            inside = packed.infolist()
            if any(not one.filename.endswith(".json") for one in inside):
                raise UserError(f"{RECORDS} holds other files than records: nothing was unpacked")
            if sum(one.file_size for one in inside) > RECORDS_BYTES:
                raise UserError(f"{RECORDS} unpacks to more than {RECORDS_BYTES} bytes: nothing was unpacked")
            packed.extractall(folder)  # It makes no links, and no file outside of the folder.
    except zipfile.BadZipFile as error:
        raise UserError(f"{RECORDS} is no archive ({error}): make the release anew with `make release`") from None


def checkpoint(path: Path) -> bool:
    """Fetch the checkpoint that is missing at ``path``, by its name. Return False where no release is set.

    Raises ``UserError`` as ``Release.file`` and ``fetched`` do.
    """
    if not os.environ.get(ADDRESS):
        return False
    with writing(path.parent, path.name), files.scratch(path.parent) as work:
        if not path.is_file():
            os.replace(fetched(at().file(path.name, work), work), path)
    return True
