"""Declare a class of settings: a frozen dataclass that checks its field types when it is created."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, TypeVar, dataclass_transform, get_type_hints

from beartype import BeartypeConf, FrozenDict
from beartype.door import is_bearable
from beartype.vale import IsInstance

from spectrim.errors import UserError

T = TypeVar("T")
# An int is accepted as a float, but a bool as neither, because rank=true does not mean rank 1.
_NO_BOOL = ~IsInstance[bool]
_NUMBERS = BeartypeConf(
    hint_overrides=FrozenDict({int: Annotated[int, _NO_BOOL], float: Annotated[float | int, _NO_BOOL]})
)


@dataclass_transform(frozen_default=True)
def settings(cls: type[T]) -> type[T]:
    """Make ``cls`` a frozen dataclass that raises ``UserError`` for a field of the wrong type.

    The check precedes the class's own or inherited ``__post_init__``, which may rely on the types.
    """
    checks: Callable[[Any], None] | None = getattr(cls, "__post_init__", None)

    def check(self: Any) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            if not all(is_bearable(part, hint, conf=_NUMBERS) for part in _parts(value)):
                wanted = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
                raise UserError(f"{type(self).__name__}: {field.name}={value!r} is not of type {wanted}")
            if field.name == "seed" or field.name.endswith("_seed"):
                require_seed(f"{type(self).__name__}: {field.name}", value)
        if checks:
            checks(self)

    cls.__post_init__ = check  # type: ignore[attr-defined]
    return dataclass(frozen=True)(cls)


def require_seed(name: str, seed: object) -> None:
    """Raise ``UserError`` where some random generator refuses ``seed``, or torch reads it as another (true, 1.5)."""
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise UserError(f"{name}={seed!r} is not a whole number in 0..{2**32 - 1}")


def require_parts(name: str, parts: Sequence[float]) -> None:
    """Raise ``UserError`` unless there is at least one number in ``parts`` and all of them lie in (0, 1)."""
    if not parts or not all(0 < part < 1 for part in parts):
        raise UserError(f"{name} must lie in (0, 1), got {list(parts)}")


def _parts(value: Any) -> list[Any]:
    """Split a sequence into sequences of one item, because beartype checks only one random item of a longer one."""
    if isinstance(value, list | tuple) and len(value):
        return [[part] for item in value for part in _parts(item)]
    return [value]
