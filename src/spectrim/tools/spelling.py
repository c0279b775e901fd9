"""Which known name was probably meant by an unknown one."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name that is nearest to ``name``; empty where none is near."""
    return next(iter(get_close_matches(name, list(known), 1)), "")


def meant(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean NAME?)`` with the nearest known name; empty where none is near."""
    near = nearest(name, known)
    return f" (did you mean {near}?)" if near else ""


def misspelt(words: Sequence[str], options: Iterable[str]) -> str:
    """Return what is said of the first word of a command that is like an option and is none; empty where all are.

    ``options``: those of the command, such as ``--help`` and ``-h``. Their beginnings count as options.
    """
    known = list(options)
    for word in words:
        if word == "--":
            break
        name = word.partition("=")[0]
        value = not word.startswith("-") or word[1:2] in ("", *".0123456789") or " " in word
        short = name[:2] in known and not name.startswith("--")  # and its value, or others
        if value or short or any(own.startswith(name) for own in known):
            continue
        near = nearest(name.lstrip("-"), (own.lstrip("-") for own in known))
        return f"{name} is no option{f' (did you mean --{near}?)' if near else ''}"
    return ""


def checked(called: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make the ``TypeError`` for a misspelt argument of a function name the one that was probably meant.

    Python itself says so from 3.13 on. The function takes no ``**kwargs``. ``called``: its name in the message.
    """

    def checked_one(function: Callable[P, T]) -> Callable[P, T]:
        known = list(inspect.signature(function).parameters)

        @wraps(function)
        def checking(*args: P.args, **kwargs: P.kwargs) -> T:
            for name in kwargs:
                if name not in known:
                    near = nearest(name, known)
                    said = f"{called}() got an unexpected keyword argument {name!r}"
                    raise TypeError(f"{said}. Did you mean {near!r}?" if near else said)
            return function(*args, **kwargs)

        return checking

    return checked_one
