"""Say which layers the user wants to be factored, and which ranks the user has set."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from spectrim.errors import UserError

REGEX = "re:"


@dataclass(frozen=True)
class LayerChoice:
    """Say which layers may be factored.

    A pattern is the name of a module, or a glob such as ``"layer4.*"``. After ``"re:"`` it is a regular expression that
    matches from the start of a name. It stands for every layer that it names, and for those inside a module that it
    names.

    ``include``: patterns of the layers that may be factored; none: all layers.
    ``exclude``: patterns of the layers that stay dense.
    ``overrides``: the rank of single layers, by name. An algorithm chooses the ranks of the others.
    ``left``: the layers that the algorithm leaves dense, by name, and why. The user's overrides come first.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    overrides: tuple[tuple[str, int], ...] = ()
    left: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, include: Sequence[str] | None, exclude: Sequence[str], overrides: Mapping[str, int]) -> "LayerChoice":
        """Make a choice of what the user gave. Raises ``UserError`` for what are no patterns or ranks."""
        patterns = {"include": include or (), "exclude": exclude}
        for argument, given in patterns.items():
            if isinstance(given, str) or not all(isinstance(pattern, str) for pattern in given):
                raise UserError(f"{argument}={given!r} is no list of names; give one such as ['fc', 'layer4.*']")
            for pattern in given:
                _compiled(argument, pattern)
        for name, rank in overrides.items():
            if type(rank) is not int or rank < 1:
                raise UserError(f"overrides[{name!r}]={rank!r} is not a rank; give a whole number of at least 1")
        return cls(tuple(patterns["include"]), tuple(patterns["exclude"]), tuple(overrides.items()))

    def require_known(self, model: nn.Module) -> None:
        """Raise ``UserError`` for a pattern or a name that no module of ``model`` has."""
        names = [name for name, _ in model.named_modules() if name]
        for argument, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                if not any(_matches(pattern, name) for name in names):
                    raise UserError(f"{argument}: {pattern!r} matches no module of this model, {_some(names)}")
        for name, _ in self.overrides:
            if name not in names:
                raise UserError(f"overrides: {name!r} is no layer of this model, {_some(names)}")

    def reason(self, name: str) -> str | None:
        """Return why the layer ``name`` stays dense; None where it may be factored."""
        places = [name[: dot.start()] for dot in re.finditer(r"\.", name)] + [name]  # the modules around it, and itself
        if any(_matches(pattern, place) for pattern in self.exclude for place in places):
            return "exclude= names it"
        if self.include and not any(_matches(pattern, place) for pattern in self.include for place in places):
            return "include= does not name it"
        return None if name in dict(self.overrides) else dict(self.left).get(name)


EVERY_LAYER = LayerChoice()


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith(REGEX):
        return re.match(pattern.removeprefix(REGEX), name) is not None
    return fnmatchcase(name, pattern)


def _compiled(argument: str, pattern: str) -> None:
    try:
        re.compile(pattern.removeprefix(REGEX) if pattern.startswith(REGEX) else "")
    except re.error as error:
        raise UserError(f"{argument}: {pattern!r} is no regular expression: {error}") from None


def _some(names: Iterable[str]) -> str:
    few = list(names)
    return f"whose modules are {', '.join(few[:8])}{' and more' if few[8:] else ''}"
