"""Find the modules of a model that a function or a weak reference in it holds: a copy would hold them still."""

import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from spectrim.errors import UserError
from spectrim.factored.dense import attributes_of
from spectrim.surgery.given_model import HOOKS


def refuse_captured(model: nn.Module) -> None:
    """Raise ``UserError`` where a function, hook or weak reference in ``model`` holds a module of it.

    ``copy.deepcopy`` copies bound methods and partial functions, but no closure. A run tells whether a copy calls the
    module there (``stand_ins``); this is for a model that is not run.
    """
    names = {module: name for name, module in model.named_modules()}
    for name, module in model.named_modules():
        own = vars(module)
        for found in _modules_in([*attributes_of(module).values(), *(own.get(hooks) for hooks in HOOKS)], False, set()):
            if found in names:
                held = f"{names[found]!r} of the given one" if names[found] else "the given one"
                raise UserError(
                    f"a function, hook or weak reference in {name or 'the model'} holds {held}, which a copy may call; "
                    "pass calibration=, inputs that show it, or let it take the module from its arguments"
                )


def _modules_in(values: Iterable[Any], kept: bool, seen: set[tuple[int, bool]]) -> Iterator[nn.Module]:
    """Yield the modules that a copy of ``values`` would still hold.

    ``kept``: whether a copy holds ``values`` themselves, as those of a closure.
    """
    for value in values:
        if (id(value), kept) in seen:
            continue
        seen.add((id(value), kept))
        if isinstance(value, nn.Module) and kept:
            yield value
        elif isinstance(value, FunctionType):
            enclosed = [*_contents(value), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
            yield from _modules_in(enclosed, True, seen)
        elif isinstance(value, weakref.ref):
            yield from _modules_in([value()], True, seen)
        elif isinstance(value, partial):
            yield from _modules_in([value.func, *value.args, *value.keywords.values()], kept, seen)
        elif isinstance(value, MethodType):
            yield from _modules_in([value.__func__, value.__self__], kept, seen)
        elif isinstance(value, dict | list | tuple | set | deque):
            yield from _modules_in(value.values() if isinstance(value, dict) else value, kept, seen)


def _contents(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # it is not set yet
            continue
