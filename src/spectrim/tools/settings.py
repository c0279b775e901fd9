"""Declare a class of settings: a frozen dataclass that checks its field types when it is created."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

from beartype import BeartypeConf, FrozenDict
from beartype.door import is_bearable
from beartype.vale import IsInstance

from spectrim.errors import UserError
from spectrim.tools import spelling

T = TypeVar("T")
# An int is accepted as a float, but a bool as neither, because rank=true does not mean rank 1.
_NO_BOOL = ~IsInstance[bool]
_NUMBERS = BeartypeConf(
    hint_overrides=FrozenDict({int: Annotated[int, _NO_BOOL], float: Annotated[float | int, _NO_BOOL]})
)


@dataclass_transform(frozen_default=True)
def settings(cls: type[T]) -> type[T]:
    """Make ``cls`` a frozen dataclass that raises ``UserError`` for a field of the wrong type.

    The check precedes the class's own or inherited ``__post_init__``, which may rely on the types. A misspelt name of a
    field raises a ``TypeError`` that tells the one that was probably meant.
    """
    checks: Callable[[Any], None] | None = getattr(cls, "__post_init__", None)

    def check(self: Any) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            if not all(is_bearable(part, hint, conf=_NUMBERS) for part in _parts(value)):
                shown = " ".join(line.strip() for line in repr(value).splitlines())
                raise UserError(f"{type(self).__name__}: {field.name}={shown} {_refusal(hint)}")
            if field.name == "seed" or field.name.endswith("_seed"):
                require_seed(f"{type(self).__name__}: {field.name}", value)
        if checks:
            checks(self)

    cls.__post_init__ = check  # type: ignore[attr-defined]
    made = dataclass(frozen=True)(cls)
    made.__init__ = spelling.checked(cls.__name__)(made.__init__)  # type: ignore[method-assign]
    return made


def require_seed(name: str, seed: object) -> None:
    """Raise ``UserError`` where some random generator refuses ``seed``, or torch reads it as another (true, 1.5)."""
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise UserError(f"{name}={seed!r} is not a whole number in 0..{2**32 - 1}")


def require_parts(name: str, parts: Sequence[float]) -> None:
    """Raise ``UserError`` unless there is at least one number in ``parts`` and all of them lie in (0, 1)."""
    if not parts or not all(0 < part < 1 for part in parts):
        raise UserError(f"{name} must lie in (0, 1), got {list(parts)}")


def _refusal(hint: Any) -> str:
    """Say what a value is not: of a type, or any of the values and types of a union."""
    allowed = _allowed(hint)
    return f"is none of: {', '.join(allowed)}" if len(allowed) > 1 else f"is not of type {allowed[0]}"


def _allowed(hint: Any) -> list[str]:
    """Return what a setting may be: the values of a ``Literal`` and the names of types."""
    if get_origin(hint) is Literal:
        return [repr(value) for value in get_args(hint)]
    if get_origin(hint) in (Union, UnionType):
        return [own for part in get_args(hint) for own in _allowed(part)]
    if hint is type(None):
        return ["None"]
    return [hint.__name__ if isinstance(hint, type) else re.sub(r"\b(typing|collections\.abc)\.", "", str(hint))]


def _parts(value: Any) -> list[Any]:
    """Split a sequence into sequences of one item, because beartype checks only one random item of a longer one."""
    if isinstance(value, list | tuple) and len(value):
        return [[part] for item in value for part in _parts(item)]
    return [value]
