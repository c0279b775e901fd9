"""Make the folder of a release: ``python experiments/release.py --out build/release``.

It holds the committed records as ``records.zip``, each checkpoint, and ``release.json`` with size and sha256 of each.
Put it where ``SPECTRIM_RELEASE`` points, such as a web server. Equal results give equal bytes.
"""

import argparse
import hashlib
import io
import json
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from spectrim.errors import UserError
from spectrim.fetch.release import INDEX, RECORDS
from spectrim.tools import digests, files


def archive(folder: Path) -> bytes:
    """Return the records as a zip archive, without dates."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as made:
        for path in sorted(folder.rglob("*.json")):
            made.writestr(zipfile.ZipInfo(path.relative_to(folder).as_posix()), path.read_bytes(), zipfile.ZIP_DEFLATED)
    return packed.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the folder. Return the exit status."""
    parser = argparse.ArgumentParser(description="Make the folder of a release.")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of records and checkpoints")
    parser.add_argument("--out", type=Path, default=Path("build/release"), help="folder to write")
    options = parser.parse_args(arguments)
    try:
        records, checkpoints = options.results / "records", options.results / "checkpoints"
        if not (records.is_dir() or checkpoints.is_dir()):
            raise UserError(f"neither records nor checkpoints in {options.results}: give their folder by --results")
        contents = {RECORDS: archive(records)}
        for path in sorted(checkpoints.rglob("*.safetensors")):
            if path.name in contents:
                raise UserError(f"two checkpoints are called {path.name}: rename one")
            contents[path.name] = path.read_bytes()
        listed = {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in contents.items()
        }
        contents[INDEX] = (json.dumps({"files": listed}, indent=1) + "\n").encode()
        files.write({options.out / name: data for name, data in contents.items()})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.out / INDEX} lists {len(listed)} files; its sha256 is {digests.of_file(options.out / INDEX)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
