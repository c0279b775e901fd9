"""How a class of settings is declared: a frozen dataclass whose field types are checked when it is made."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar, dataclass_transform, get_type_hints

from beartype import BeartypeConf
from beartype.door import is_bearable

from spectrim.errors import UserError

T = TypeVar("T")
_INT_PASSES_FOR_FLOAT = BeartypeConf(is_pep484_tower=True)


@dataclass_transform(frozen_default=True)
def settings(cls: type[T]) -> type[T]:
    """Make ``cls`` a frozen dataclass; a field of the wrong type raises ``UserError`` in one line.

    The types are checked before the class's own ``__post_init__``, which may then rely on them.
    """
    own_checks: Callable[[Any], None] | None = cls.__dict__.get("__post_init__")

    def check(self: Any) -> None:
        hints = get_type_hints(cls)
        for field in fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            if not is_bearable(value, hint, conf=_INT_PASSES_FOR_FLOAT):
                wanted = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
                raise UserError(f"{cls.__name__}: {field.name}={value!r} is not of type {wanted}")
        if own_checks:
            own_checks(self)

    cls.__post_init__ = check  # type: ignore[attr-defined]
    return dataclass(frozen=True)(cls)
