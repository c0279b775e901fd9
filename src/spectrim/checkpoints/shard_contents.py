"""What a compressed shard holds, and in which order: the factors of its layers, and all other tensors as they are."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from spectrim.errors import UserError
from spectrim.factored import large, linalg
from spectrim.factored.forms import PivotedForm, PlainForm
from spectrim.factored.pivoting import pivoted
from spectrim.factored.plan import RankPlan
from spectrim.tools.safetensors_stream import DTYPES, Entry, Shard, raw

FORMS: Mapping[str, PlainForm | PivotedForm] = {"plain": PlainForm("linear"), "pivoted": PivotedForm("linear")}
POSITIONS = "second.positions"  # of the pivots: 4 bytes a row, as in ``Completion``


def entries(shard: Shard, plan: RankPlan, flipped: Collection[str]) -> dict[str, Entry]:
    """Return the tensors of the compressed shard, in the order in which ``contents`` yields them.

    Wide numbers come first, so that each tensor begins at a multiple of its number's width. The positions of pivots are
    known only after the layers, whose numbers may be narrower. So they come behind those, and behind them one tensor
    of 2-byte numbers, if without it the positions would not begin at a multiple of 4.

    ``flipped``: layers whose weight is stored transposed.
    """
    wide, narrow = _ordered(shard)
    found = {new: entry for old in wide for new, entry in _entries(old, shard, plan, flipped).items()}
    late = _late(found, plan)
    first = {name: entry for name, entry in found.items() if name not in late}
    return first | {name: found[name] for name in late} | {name: shard.entries[name] for name in narrow}


def contents(shard: Shard, plan: RankPlan, flipped: Collection[str], bar: "tqdm") -> Iterator[bytes | memoryview]:
    """Yield the bytes of the compressed shard, and move ``bar`` by the bytes that were read."""
    wide, narrow = _ordered(shard)
    found = {new: entry for old in wide for new, entry in _entries(old, shard, plan, flipped).items()}
    held: dict[str, bytes] = dict.fromkeys(_late(found, plan), b"")
    for name in [*wide, None, *narrow]:
        if name is None:  # All that is wide is written.
            yield from held.values()
            continue
        for new, pieces in _made(name, shard, plan, flipped):
            if new in held:
                held[new] = b"".join(pieces)
            else:
                yield from pieces
        bar.update(shard.entries[name].nbytes)


def _ordered(shard: Shard) -> tuple[list[str], list[str]]:
    """Return the tensors of a shard, those of wide numbers first, apart from those of a byte or less a number."""

    def width(name: str) -> float:
        dtype, shape, nbytes = shard.entries[name]
        return DTYPES[dtype].itemsize if dtype in DTYPES else nbytes / max(1, math.prod(shape))

    names = sorted(shard.entries, key=width, reverse=True)
    return [name for name in names if width(name) >= 2], [name for name in names if width(name) < 2]


def _late(found: Mapping[str, Entry], plan: RankPlan) -> list[str]:
    """Return the positions of the pivots among the tensors ``found``, and the tensor that follows them, if any."""
    made = {f"{layer}.{POSITIONS}" for layer in plan}
    positions = [name for name in found if name in made]
    others = [name for name in found if name not in positions]
    if not positions or sum(found[name].nbytes for name in others) % 4 == 0:
        return positions
    odd = [name for name in others if found[name].nbytes % 4]
    return [*positions, min(odd, key=lambda name: found[name].nbytes)]


def _entries(name: str, shard: Shard, plan: RankPlan, flipped: Collection[str]) -> dict[str, Entry]:
    """Return what one tensor becomes: the factors of a layer's weight, or the tensor itself."""
    layer, _, part = name.rpartition(".")
    entry = shard.entries[name]
    if layer not in plan or part not in ("weight", "bias"):
        return {name: entry}
    if part == "bias":
        return {f"{layer}.second.bias": entry}
    rank, (outputs, inputs) = plan[layer].rank, entry.shape[::-1] if layer in flipped else entry.shape
    first = {f"{layer}.first.weight": Entry.of(entry.dtype, rank, inputs)}
    if plan[layer].form == FORMS["plain"]:
        return {**first, f"{layer}.second.weight": Entry.of(entry.dtype, outputs, rank)}
    others = {f"{layer}.second.others.weight": Entry.of(entry.dtype, outputs - rank, rank)}
    return {**first, **others, f"{layer}.{POSITIONS}": Entry.of("I32", outputs)}


def _made(
    name: str, shard: Shard, plan: RankPlan, flipped: Collection[str]
) -> Iterator[tuple[str, Iterable[bytes | memoryview]]]:
    """Yield the name and the bytes of each tensor that one becomes, in the order of ``_entries``."""
    names = list(_entries(name, shard, plan, flipped))
    layer, _, part = name.rpartition(".")
    if layer not in plan or part != "weight":
        yield names[0], shard.pieces(name)
        return
    try:
        tensors = _factors(shard, name, plan, layer in flipped)
    except UserError as error:
        raise UserError(f"layer {layer} of {shard.path}: {error}") from None
    for new in names:
        yield new, [raw(tensors.pop(0))]


def _factors(shard: Shard, name: str, plan: RankPlan, flipped: bool) -> list[Tensor]:
    """Return the tensors of a layer's factors, in the order of ``_entries``."""
    kept, dtype = plan[name.rpartition(".")[0]], DTYPES[shard.entries[name].dtype]
    read = partial(_weight, shard, name, flipped)
    if kept.form == FORMS["plain"]:
        return list(large.truncated(read, kept.rank))[::-1]
    # The pivots are taken of unrounded factors, so that their numbers are rounded once.
    found = pivoted(*large.truncated(read, kept.rank, torch.promote_types(dtype, torch.float32)))
    factors = [linalg.in_precision(factor, dtype) for factor in (found.pivot_rows_RI, found.coefficients_MR)]
    return [*factors, found.positions.to(torch.int32)]


def _weight(shard: Shard, name: str, flipped: bool) -> Tensor:
    weight = shard.read(name)
    return weight.T if flipped else weight
