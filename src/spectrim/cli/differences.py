"""What differs between two records."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spectrim.errors import UserError
from spectrim.records import records

LONGEST = 60  # characters of a value


def found(given: str, folder: Path) -> Path:
    """Return the path of a record: ``given`` itself, or the record in ``folder`` whose signature begins so.

    Raises ``UserError`` where there is none, or more than one.
    """
    if Path(given).is_file():
        return Path(given)
    near = [path for path in sorted(folder.rglob("*.json")) if records.is_record(path) and path.stem.startswith(given)]
    if len(near) != 1:
        many = ", ".join(str(path) for path in near[:3])
        raise UserError(
            f"{given} is no file; below {folder} {f'it may be {many}' if many else 'no signature begins so'}"
        )
    return near[0]


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return place, first and second value of all that differs. A value that a record lacks is ``-``."""
    one, other = dict(_values(first)), dict(_values(second))
    return [(place, _text(one, place), _text(other, place)) for place in one | other if _differ(one, other, place)]


def _differ(one: dict[str, Any], other: dict[str, Any], place: str) -> bool:
    return place not in one or place not in other or one[place] != other[place]


def _values(node: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of a record with its place. The rows of a log are one value, for there may be thousands."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _values(value, f"{where}.{key}" if where else str(key))
    elif where == "layers" and isinstance(node, list):
        for index, row in enumerate(node):
            yield from _values(row, f"layers[{row.get('layer', index) if isinstance(row, Mapping) else index}]")
    else:
        yield where, node


def _text(values: Mapping[str, Any], place: str) -> str:
    if place not in values:
        return "-"
    text = json.dumps(values[place], ensure_ascii=False)
    if len(text) <= LONGEST:
        return text
    return f"{len(values[place])} entries" if isinstance(values[place], list) else f"{text[:LONGEST]}…"
