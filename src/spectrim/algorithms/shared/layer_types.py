"""Group the layers of a model that do the same in each of its blocks."""

from collections.abc import Iterable

from torch import nn


def by_type(model: nn.Module, names: Iterable[str]) -> list[list[str]]:
    """Return ``names`` in groups of layers of one type, such as the query projections of all blocks.

    Layers are of one type if their weights have one shape, and their names differ in nothing but numbers.
    """
    groups: dict[tuple, list[str]] = {}
    for name in names:
        path = tuple(part for part in name.split(".") if not part.isdigit())
        shape = tuple(model.get_submodule(name).weight.shape)  # type: ignore[arg-type]
        groups.setdefault((path, shape), []).append(name)
    return list(groups.values())
