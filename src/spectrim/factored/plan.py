"""A plan says what is kept of each layer. It is immutable and comparable, and JSON holds it in files."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from reprlib import repr as short
from typing import Any

from spectrim.errors import UserError
from spectrim.factored.forms import Form

# A rank, which keeps the leading components, or the indices of the components that are kept.
Keep = int | tuple[int, ...]


def rank_of(keep: Keep) -> int:
    """Return the number of components in ``keep``."""
    return keep if isinstance(keep, int) else len(keep)


@dataclass(frozen=True)
class Kept:
    """The components kept of one layer, and the form of its factors."""

    keep: Keep
    form: Form

    @property
    def rank(self) -> int:
        return rank_of(self.keep)


@dataclass(frozen=True)
class RankPlan(Mapping[str, Kept]):
    """A mapping from layer name to what is kept of it. A layer that is absent stays dense.

    Equal plans give equal models.
    """

    kept: tuple[tuple[str, Kept], ...] = ()

    @classmethod
    def of(cls, kept: Mapping[str, Kept]) -> "RankPlan":
        """Make a plan from a mapping in any order."""
        return cls(tuple(sorted(kept.items(), key=lambda item: item[0])))

    def __getitem__(self, layer: str) -> Kept:
        return self._by_layer[layer]

    @cached_property
    def _by_layer(self) -> dict[str, Kept]:
        return dict(self.kept)

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.kept)

    def __len__(self) -> int:
        return len(self.kept)

    def as_dict(self) -> dict[str, dict]:
        """Return plain numbers, strings and lists, for JSON."""
        plain = {}
        for name, kept in self.kept:
            which = {"rank": kept.keep} if isinstance(kept.keep, int) else {"components": list(kept.keep)}
            plain[name] = {**which, "form": kept.form.to_text()}
        return plain

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "RankPlan":
        """Read the plan that ``to_json`` wrote. Raises ``UserError`` where ``text`` is not a plan."""
        try:
            plain = json.loads(text)
            if not isinstance(plain, dict):
                raise ValueError(f"it is a {type(plain).__name__}, not an object with one entry for each layer")
            return cls.of({name: _kept(name, entry) for name, entry in plain.items()})
        except (ValueError, RecursionError) as error:
            raise UserError(f"not a rank plan: {error}") from None


def _kept(layer: str, entry: Any) -> Kept:
    """Read the entry of one layer. Raises ``ValueError``."""
    if not isinstance(entry, dict) or "form" not in entry or not {"rank", "components"} & entry.keys():
        raise ValueError(f"layer {short(layer)} needs a form, and a rank or components")
    keep = tuple(_components(layer, entry["components"])) if "components" in entry else _whole(layer, entry["rank"], 1)
    return Kept(keep, Form.from_text(entry["form"]))


def _components(layer: str, indices: Any) -> list[int]:
    if not isinstance(indices, list) or not indices:
        raise ValueError(f"the components of layer {short(layer)} are no list of at least one index")
    found = [_whole(layer, index, 0) for index in indices]
    if len(set(found)) < len(found):
        raise ValueError(f"the components of layer {short(layer)} name one of them twice")
    return found


def _whole(layer: str, value: Any, least: int) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{short(value)} of layer {short(layer)} is no whole number of at least {least}")
    return value
