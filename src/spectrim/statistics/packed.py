"""Second moments of which one triangle is held, as they are symmetric. The other would double their memory.

The product ``x^T x`` is symmetric to the last bit in the usual libraries. In any other, what is decomposed stays the
same: ``torch.linalg.eigh`` reads the lower triangle.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from spectrim.tools.resume import Result

SMALLEST = 256  # rows; smaller matrices take little memory


@dataclass(frozen=True, eq=False)
class Packed:
    """Symmetric matrices (g, n, n), n = ``side``, by their lower triangles, which ``values`` hold as rectangles.

    The rectangle is that of LAPACK's full packed format. Let h be n / 2, rounded up. The first h columns stand in the
    last n rows. The lower triangle of the other columns stands transposed in the corner above the diagonal.
    """

    values: Tensor
    side: int

    def full(self) -> Tensor:
        """Return the matrices."""
        h, odd = self.values.shape[-1], self.side % 2
        found = self.values.new_zeros(len(self.values), self.side, self.side)
        found[..., :h] = self.values[:, 1 - odd :].tril()
        found[..., h:, h:] = self.values[:, : self.side - h, odd:].triu().mT
        return found.add_(found.tril(-1).mT)


Moment = Packed | Tensor


def held(moment: Tensor) -> Tensor:
    """Return what is held of a moment (g, n, n), to be added up: its lower triangle if it is large, else all of it."""
    side = moment.shape[-1]
    if side < SMALLEST:
        return moment
    h, odd = (side + 1) // 2, side % 2
    found = moment.new_zeros(len(moment), side + 1 - odd, h)
    found[:, 1 - odd :] = moment[..., :h].tril()
    found[:, : side - h, odd:] += moment[..., h:, h:].mT.triu()
    return found


def moment_of(values: Tensor, side: int) -> Moment:
    """Return the moment of which ``values`` are ``held``."""
    return Packed(values, side) if values.ndim == 3 and values.shape[-1] < side else values


def entries(side: int) -> int:
    """Return how many numbers are held of a moment (n, n), n = ``side``."""
    return side**2 if side < SMALLEST else side * (side + 1) // 2


class PackedMoments(Mapping[str, Tensor]):
    """Moments by key, each made anew from its triangle when it is looked up.

    ``parts``: what is held. Two layers may hold one moment together.
    """

    def __init__(self, parts: Mapping[str, Moment]) -> None:
        self.parts = dict(parts)

    def __getitem__(self, key: str) -> Tensor:
        found = self.parts[key]
        return found.full() if isinstance(found, Packed) else found

    def __contains__(self, key: object) -> bool:
        return key in self.parts

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def held(self) -> list[Tensor]:
        """Return what is held of each moment."""
        return [own.values if isinstance(own, Packed) else own for own in self.parts.values()]


def nbytes(moments: Iterable[PackedMoments]) -> int:
    """Return the bytes of all moments. One that several layers hold together counts once."""
    return sum({id(own): own.nbytes for each in moments for own in each.held()}.values())


def as_result(moments: Mapping[str, PackedMoments]) -> Result:
    """Return the moments of layers as a folder of ``resume`` keeps them. One that several layers hold is kept once."""
    places: dict[int, int] = {}
    tensors: dict[str, Tensor] = {}
    layers: dict[str, list[tuple[str, int, int | None]]] = {}
    for name, own in moments.items():
        layers[name] = []
        for view, one in own.parts.items():
            place = places.setdefault(id(one), len(places))
            tensors[str(place)] = one.values if isinstance(one, Packed) else one
            layers[name].append((view, place, one.side if isinstance(one, Packed) else None))
    return Result(tensors, {"layers": json.dumps(layers)})


def of_result(result: Result) -> dict[str, PackedMoments]:
    """Return what ``as_result`` was called on."""
    held: dict[int, Moment] = {}
    found = {name: PackedMoments({}) for name in json.loads(result.texts["layers"])}
    for name, parts in json.loads(result.texts["layers"]).items():
        for view, place, side in parts:
            values = result.tensors[str(place)]
            found[name].parts[view] = held.setdefault(place, values if side is None else Packed(values, side))
    return found
