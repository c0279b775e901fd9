"""Ask the OSV database whether a version in a lock file has a known vulnerability.

    python .ci/vulnerabilities.py requirements.lock ...

It ends with status 1 where there is one. Without an answer within some seconds it says "not checked" and ends with 0.
"""

import argparse
import json
import re
import sys
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

OSV = "https://api.osv.dev/v1/querybatch"
SECONDS = 10.0
PIN = re.compile(r"^([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", re.MULTILINE)

# Vulnerabilities that do not concern us, by id, with the reason. For one that has no mended version yet.
ACCEPTED: dict[str, str] = {}


def pins(locks: list[Path]) -> list[tuple[str, str]]:
    """Return the packages and versions in lock files."""
    found = {pin for lock in locks for pin in PIN.findall(lock.read_text())}
    return sorted(found)


def known(packages: list[tuple[str, str]], address: str) -> list[str]:
    """Return a line for each known vulnerability. Raises ``OSError`` or ``ValueError`` where there is no answer."""
    asked = [{"package": {"name": name, "ecosystem": "PyPI"}, "version": version} for name, version in packages]
    body, headers = json.dumps({"queries": asked}).encode(), {"Content-Type": "application/json"}
    with urlopen(Request(address, body, headers), timeout=SECONDS) as answer:
        results: list[dict[str, Any]] = json.load(answer)["results"]
    pairs = zip(packages, results, strict=True)
    return [
        f"{name} {version}: https://osv.dev/vulnerability/{one['id']}"
        for (name, version), result in pairs
        for one in result.get("vulns", [])
        if one["id"] not in ACCEPTED
    ]


def main() -> None:
    """Entry of the script."""
    parser = argparse.ArgumentParser(description="Ask OSV for known vulnerabilities of pinned packages.")
    parser.add_argument("locks", nargs="+", type=Path, metavar="LOCK")
    parser.add_argument("--address", default=OSV, help=f"of the database; default: {OSV}")
    options = parser.parse_args()
    packages = pins(options.locks)
    try:
        found = known(packages, options.address)
    except (OSError, ValueError, LookupError, TypeError, HTTPException) as error:
        print(f"known vulnerabilities: not checked ({type(error).__name__}: {error})")
        return
    print(f"known vulnerabilities: {len(found)} in {len(packages)} packages", *found, sep="\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
