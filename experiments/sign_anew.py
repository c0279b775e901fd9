"""Sign records of an older version anew: ``python experiments/sign_anew.py results/records results/checkpoints``.

A record of schema 1 names classes by the path of their module. This script writes it again by the present schema and
signature. The old signature stays in ``former_signature``, and the mark ``.tracked`` moves along. The record beside a
checkpoint has no signature; only its classes are renamed. Records of the present schema stay as they are.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from spectrim.errors import UserError
from spectrim.records import records
from spectrim.tools import files


def sign(path: Path) -> bool:
    """Sign the record at ``path`` anew. Return whether it changed."""
    old = json.loads(path.read_text(encoding="utf-8"))
    if "signature" not in old:
        return _rename_classes(path, old)
    if old["schema"] != 1:
        return False
    new = records.read(path)
    content, written = records.encode(new), path.with_name(f"{new['signature']}.json")
    if written.exists() and written.read_bytes() != content:
        raise UserError(f"{path} and {written} are records of the same run: delete one of them")
    files.write({written: content})  # also after a kill that came before the old file was removed
    mark = path.with_suffix(".tracked")
    if mark.exists():
        mark.replace(written.with_suffix(".tracked"))
    path.unlink()
    return True


def _rename_classes(path: Path, record: dict) -> bool:
    config = records.identity(record["config"])
    if config != record["config"]:
        files.write({path: (json.dumps({**record, "config": config}, indent=1) + "\n").encode()})
    return config != record["config"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Sign the records of all folders. Return the exit status."""
    parser = argparse.ArgumentParser(description="Sign records of an older version anew.")
    parser.add_argument("folders", nargs="+", type=Path, help="folder of records, or of checkpoints and their records")
    folders = parser.parse_args(arguments).folders
    try:
        for folder in folders:
            if not folder.is_dir():
                raise UserError(f"there is no folder {folder}; give one of records, or of checkpoints")
        found = [path for folder in folders for path in sorted(folder.rglob("*.json")) if records.is_record(path)]
        signed = [sign(path) for path in found]
    except (UserError, OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{sum(signed)} of {len(signed)} records signed anew")
    return 0


if __name__ == "__main__":
    sys.exit(main())
