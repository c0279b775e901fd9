"""Second moments of which one triangle is held, as they are symmetric. The other would double their memory.

The product ``x^T x`` is symmetric to the last bit in the usual libraries. In any other, what is decomposed stays the
same: ``torch.linalg.eigh`` reads the lower triangle.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

SMALLEST = 256  # rows; smaller matrices take little memory


@dataclass(frozen=True, eq=False)
class Packed:
    """Symmetric matrices by their lower triangles, row by row: ``values`` of shape (g, n (n + 1) / 2), n = ``side``."""

    values: Tensor
    side: int

    def full(self) -> Tensor:
        """Return the matrices, of shape (g, n, n)."""
        rows, columns = _triangle(self.side, self.values.device)
        found = self.values.new_empty(len(self.values), self.side, self.side)
        found[:, rows, columns] = self.values
        found[:, columns, rows] = self.values
        return found


Moment = Packed | Tensor


def held(moment: Tensor) -> Tensor:
    """Return what is held of a moment (g, n, n), to be added up: its lower triangle if it is large, else all of it."""
    side = moment.shape[-1]
    if side < SMALLEST:
        return moment
    rows, columns = _triangle(side, moment.device)
    return moment.flatten(1).index_select(1, rows * side + columns)


def moment_of(values: Tensor, side: int) -> Moment:
    """Return the moment of which ``values`` are ``held``."""
    return Packed(values, side) if values.ndim == 2 else values


def entries(side: int) -> int:
    """Return how many numbers are held of a moment (n, n), n = ``side``."""
    return side**2 if side < SMALLEST else side * (side + 1) // 2


@lru_cache(maxsize=4)  # as many sides as the layers of a decoder block have
def _triangle(side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows, columns = torch.tril_indices(side, side, device=device)
    return rows, columns


class Unpacked(Mapping[str, Tensor]):
    """Moments by key, each made anew from its triangle when it is looked up."""

    def __init__(self, moments: Mapping[str, Moment]) -> None:
        self._moments = moments

    def __getitem__(self, key: str) -> Tensor:
        found = self._moments[key]
        return found.full() if isinstance(found, Packed) else found

    def __contains__(self, key: object) -> bool:
        return key in self._moments

    def __iter__(self) -> Iterator[str]:
        return iter(self._moments)

    def __len__(self) -> int:
        return len(self._moments)

    def held(self) -> list[Tensor]:
        """Return what is held of each moment."""
        return [own.values if isinstance(own, Packed) else own for own in self._moments.values()]


def nbytes(moments: Iterable[Unpacked]) -> int:
    """Return the bytes of all moments. One that several layers hold together counts once."""
    return sum({id(own): own.nbytes for each in moments for own in each.held()}.values())
