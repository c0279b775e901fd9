"""Read, write and sign records. A record is the result of one run.

A record is a JSON file ``<records>/<experiment>/<signature>.json``, which is written atomically. Tables and figures
need records only, so this module does not import torch.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from spectrim.errors import UserError
from spectrim.tools import files

Record = dict[str, Any]

SCHEMA = 2  # Schema 1 named classes by module path, so no module could move.
CLASS = "_class_"
SEAL = "content_sha256"  # Records made before it was added have none.
# Of these packages, a class is signed by its name alone, so that its module may move. Of others, by its full name: a
# class of a user must not be taken for one of ours that has its name and settings.
BY_NAME = ("spectrim.", "torch.", "torchvision.")
# Settings that were added after the first records: owner (``run`` or a class name) → setting → the value that the first
# records were made with. The signature omits a setting at that value, so that older records keep their signatures.
LATE: Mapping[str, Mapping[str, Any]] = {
    "run": {"batch_norm": "keep", "also": {}, "agreement": {}, "paired": False},
    "ImageFolder": {"classes": ""},
    "Joint": {"ranks": "greedy", "refine": None, "refit_by": "outputs"},
    "Recipe": {"optimizer": "sgd"},
    "Refitted": {"refine": None, "refit_by": "outputs"},
    "SVD": {"factors": "plain"},
    "Truncation": {"common": "ratio"},
    "TwoSidedSVD": {"embeddings": False, "whole": 0.0},
    "WhitenedSVD": {"factors": "plain"},
}
# Settings that have another name now: class → setting → its name in records, which keep their signatures.
RENAMED: Mapping[str, Mapping[str, str]] = {
    "Compact": {"verified_tolerance": "budget"},
    "Lossless": {"verified_tolerance": "budget"},
}
REQUIRED = ("schema", "signature", "experiment", "names", "config", "seed", "dense", "compressed", "provenance")


def identity(settings: Mapping[str, Any], owner: str = "run") -> dict[str, Any]:
    """Return the part of a configuration that the signature covers.

    It names each class of ``BY_NAME`` without its module. It omits settings in ``LATE`` at the value given there, and
    names those in ``RENAMED`` as records do.

    ``settings``: a configuration with Hydra's ``_target_``.
    ``owner``: key of ``LATE`` for settings without a ``_target_``.
    """
    found: dict[str, Any] = {}
    if "_target_" in settings:
        target = str(settings["_target_"])
        owner = target.rpartition(".")[2] if target.startswith(BY_NAME) else target
        found[CLASS] = owner
    late, renamed = LATE.get(owner, {}), RENAMED.get(owner, {})
    for key, value in settings.items():
        if key != "_target_" and not (key in late and value == late[key]):
            found[renamed.get(key, key)] = _identity_of(value)
    return found


def _identity_of(value: Any) -> Any:
    if isinstance(value, Mapping):
        return identity(value, "")
    return [_identity_of(item) for item in value] if isinstance(value, list | tuple) else value


def class_of(settings: Mapping[str, Any]) -> str:
    """Return the class that the settings of a record configure, in lower case, such as ``joint``."""
    return str(settings[CLASS]).lower()


def algorithm_of(record: Record) -> str:
    """Return the class of a record's algorithm in lower case, such as ``joint``."""
    return class_of(record["config"]["algorithm"])


def signature(config: Mapping[str, Any]) -> str:
    """Return the signature of a run: the first 16 hex digits of the sha256 of its scientific configuration.

    The signature does not depend on the order of keys, or on whether a whole number is written 1 or 1.0.
    Raises ``UserError`` where the configuration holds a value that JSON cannot express (NaN, an object).
    """
    for where, number in _numbers(config, ""):
        if not math.isfinite(number):
            raise UserError(f"{where} is {number}: a run cannot be signed with it; give a finite number")
    try:
        text = json.dumps(_canonical(config), sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"the configuration cannot be signed: {error}; use numbers, text and lists") from error
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def path_of(folder: Path, experiment: str, signature: str) -> Path:
    """Return the path of a run's record.

    An experiment may be nested (``imagenet/table2``). Raises ``UserError`` where it is empty or leaves ``folder``.
    """
    parts = PurePosixPath(experiment).parts
    if not parts or ".." in parts or PurePosixPath(experiment).is_absolute():
        raise UserError(f"experiment {experiment!r} is not a name: use one such as table2 or imagenet/table2")
    return Path(folder).joinpath(*parts) / f"{signature}.json"


def name_of(record: Record) -> str:
    """Return EXPERIMENT/SIGNATURE, which names a record inside its folder."""
    return f"{record['experiment']}/{record['signature']}"


def encode(record: Record) -> bytes:
    """Return the bytes of a record's file. Raises ``UserError`` where a number is not finite or a field is missing."""
    missing = [key for key in REQUIRED if key not in record]
    if missing:
        raise UserError(f"a record needs {', '.join(missing)}: nothing was written")
    for where, number in _numbers(record, ""):
        if not math.isfinite(number):
            raise UserError(f"{where} is {number}: a record holds finite numbers only, so nothing was written")
    return (json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _numbers(value: Any, where: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _numbers(item, f"{where}[{index}]")
    elif isinstance(value, float):
        yield where, value


def sealed(record: Record) -> Record:
    """Return ``record`` with a sha256 of its content, by which ``read`` tells a record that was altered."""
    return {**record, SEAL: _content_sha256(json.loads(json.dumps(record)))}  # as it is read: keys are text


def _content_sha256(record: Record) -> str:
    content = {key: value for key, value in record.items() if key != SEAL}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digest(record: Record) -> str:
    """Return the sha256 of a record's bytes, as ``sha256sum`` prints it for the file."""
    return hashlib.sha256(encode(record)).hexdigest()


def write(folder: Path, record: Record) -> Path:
    """Write a record and return its path. Raises ``UserError`` where that fails, and then leaves no file behind."""
    path = path_of(folder, record["experiment"], record["signature"])
    files.write({path: encode(record)})
    return path


def read_own(path: Path) -> Record:
    """Read the record of a run that is asked for again.

    Raises ``UserError`` as ``read`` does, and where its signature is not that of its configuration.
    """
    record = read(path)
    if not path.stem == record["signature"] == signature(record["config"]):
        raise UserError(f"{path} is of another configuration than its signature says: delete it and run it again")
    return record


def read(path: Path) -> Record:
    """Read one record.

    Raises ``UserError`` where the file is missing, truncated, altered, or not a record of this schema.
    """
    path = Path(path)
    try:
        record = files.read_json(path)
    except OSError as error:
        raise UserError(f"cannot read the record {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is cut short or not JSON: delete it and run its experiment again") from error
    if not isinstance(record, dict) or any(key not in record for key in REQUIRED):
        raise UserError(f"{path} is not a record of a run: delete it and run its experiment again")
    if SEAL in record and record[SEAL] != _content_sha256(record):
        raise UserError(f"{path} was altered: delete it and run its experiment again")
    if record["schema"] == 1:
        record = signed_anew(record)
    if record["schema"] != SCHEMA:
        raise UserError(f"{path} has schema {record['schema']}, this version reads {SCHEMA}: update spectrim")
    return record


def signed_anew(record: Record) -> Record:
    """Return a record of schema 1 with its present signature; ``former_signature`` keeps the old one."""
    config = identity(record["config"])
    names = {"schema": SCHEMA, "signature": signature(config), "former_signature": record["signature"]}
    return {**names, **{key: value for key, value in record.items() if key not in names}, "config": config}


def first_signature(record: Record) -> str:
    """Return the first signature of a record. It breaks ties in sorting, so new signatures do not reorder a table."""
    return str(record.get("former_signature", record["signature"]))


def read_all(folder: Path, experiment: str) -> list[Record]:
    """Return the records of one experiment, sorted by ``first_signature``; an empty list if the folder does not exist.

    It ignores the temporary folders of a killed run, which end in ``.tmp``.
    """
    place = path_of(folder, experiment, "any").parent
    return sorted(map(read, filter(is_record, place.glob("*.json"))), key=first_signature)


def failure_path(record: Path) -> Path:
    """Return the path of the note on a failed run. It lies beside the place of its record."""
    return record.with_suffix(".failed.json")


def state_path(folder: Path, name: str) -> Path:
    """Return the path of the state that an unfinished run leaves.

    ``name``: the signature of the run, or the stem of its checkpoint.
    """
    return folder / f"{name}.state.safetensors"


def is_record(path: Path) -> bool:
    """Return whether a JSON file in a folder of records is a record, by its name. A note on a failed run is none."""
    return "." not in path.stem
