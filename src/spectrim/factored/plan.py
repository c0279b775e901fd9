"""What is kept of each layer: immutable, comparable, and JSON."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from spectrim.errors import UserError


@dataclass(frozen=True)
class Kept:
    """The components kept of one layer: a rank (the leading ones) or their indices, and the form of its factors."""

    keep: int | tuple[int, ...]
    form: str

    @property
    def rank(self) -> int:
        return self.keep if isinstance(self.keep, int) else len(self.keep)


@dataclass(frozen=True)
class RankPlan(Mapping[str, Kept]):
    """Layer name to what is kept of it; a layer that is absent stays dense. Equal plans give equal models."""

    kept: tuple[tuple[str, Kept], ...] = ()

    @classmethod
    def of(cls, kept: Mapping[str, Kept]) -> "RankPlan":
        """A plan from a mapping, in whatever order that is."""
        return cls(tuple(sorted(kept.items())))

    def __getitem__(self, layer: str) -> Kept:
        for name, kept in self.kept:
            if name == layer:
                return kept
        raise KeyError(layer)

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.kept)

    def __len__(self) -> int:
        return len(self.kept)

    def as_dict(self) -> dict[str, dict]:
        """Plain numbers, strings and lists, for JSON."""
        plain = {}
        for name, kept in self.kept:
            which = {"rank": kept.keep} if isinstance(kept.keep, int) else {"components": list(kept.keep)}
            plain[name] = {**which, "form": kept.form}
        return plain

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "RankPlan":
        """The plan written by ``to_json``. Raises ``UserError`` where the text is not one."""
        try:
            plain = json.loads(text)
            return cls.of({name: Kept(_keep(entry), str(entry["form"])) for name, entry in plain.items()})
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(f"not a rank plan: {error}") from None


def _keep(entry: Mapping) -> int | tuple[int, ...]:
    keep = tuple(int(i) for i in entry["components"]) if "components" in entry else int(entry["rank"])
    if (keep if isinstance(keep, int) else len(keep)) < 1:
        raise ValueError("a factored layer keeps at least one component")
    return keep
