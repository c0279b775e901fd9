"""Read and write safetensors files one tensor at a time, in memory for one tensor whatever the size of the file.

The safetensors library maps a file as a whole, and writes one only from tensors that are all in memory. The format is
simple: the length of a header, the header in JSON, and the numbers (its documentation, "Format"). The library reads
what this module writes.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectrim.errors import UserError
from spectrim.tools import files

BLOCK_BYTES = 1 << 22  # size of the blocks that are copied
HEADER_BYTES = 100_000_000  # the longest header that the format admits
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
FLOATS = ("F64", "F32", "F16", "BF16")  # the types that weights are computed in
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """A tensor in a file.

    ``dtype``: name of the type in the format.
    ``nbytes``: size in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, dtype: str, *shape: int) -> "Entry":
        """Return an entry of one of the ``DTYPES``."""
        return cls(dtype, shape, math.prod(shape) * DTYPES[dtype].itemsize)


@dataclass(frozen=True)
class Shard:
    """A safetensors file, of which only the header is in memory.

    ``starts``: position in the file at which each tensor begins.
    """

    path: Path
    entries: dict[str, Entry]
    starts: dict[str, int]
    metadata: dict[str, str]

    @classmethod
    def at(cls, path: Path) -> "Shard":
        """Read the header of a file. Raises ``UserError`` where it is missing, cut short or no safetensors file."""
        try:
            with path.open("rb") as file:
                length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
                if not 0 < length <= min(HEADER_BYTES, size - 8):
                    raise ValueError("its header does not fit into it")
                header = json.loads(file.read(length))
            metadata = {str(key): str(value) for key, value in header.pop("__metadata__", {}).items()}
            placed = {name: _placed(fields) for name, fields in header.items()}
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path} is cut short or not a safetensors file ({error}); fetch or make it again"
            ) from None
        spans = sorted((begin, begin + entry.nbytes) for begin, entry in placed.values())
        if [begin for begin, _ in [*spans, (size - 8 - length, 0)]] != [0, *(end for _, end in spans)]:
            raise UserError(
                f"{path} is cut short or not a safetensors file (bytes are missing); fetch or make it again"
            )
        starts = {name: 8 + length + begin for name, (begin, _) in placed.items()}
        return cls(path, {name: entry for name, (_, entry) in placed.items()}, starts, metadata)

    def renamed(self, names: Mapping[str, str]) -> "Shard":
        """Return the same file with the tensors in ``names``, an old name to a new one, and without all others."""
        kept = {new: old for old, new in names.items() if old in self.entries}
        entries = {new: self.entries[old] for new, old in kept.items()}
        return Shard(self.path, entries, {new: self.starts[old] for new, old in kept.items()}, self.metadata)

    def read(self, name: str) -> Tensor:
        """Return one tensor. Raises ``UserError`` for a type of number that is not among ``DTYPES``."""
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise UserError(f"{self.path}: {name} is of type {entry.dtype}; known are {', '.join(DTYPES)}")
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        with self.path.open("rb") as file:
            file.seek(self.starts[name])
            if file.readinto(raw(tensor)) != entry.nbytes:
                raise UserError(f"{self.path} became shorter while it was read")
        return tensor

    def pieces(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of one tensor in blocks. Raises ``UserError`` where the file has become shorter."""
        left = self.entries[name].nbytes
        with self.path.open("rb") as file:
            file.seek(self.starts[name])
            while left:
                block = file.read(min(left, BLOCK_BYTES))
                if not block:
                    raise UserError(f"{self.path} became shorter while it was read")
                left -= len(block)
                yield block


def _placed(fields: Mapping[str, Any]) -> tuple[int, Entry]:
    """Return the position of a tensor and its entry. Raises ``ValueError`` where shape and bytes disagree."""
    begin, end = fields["data_offsets"]
    dtype, shape, nbytes = fields["dtype"], tuple(fields["shape"]), end - begin
    if not all(type(number) is int and number >= 0 for number in (begin, nbytes, *shape)):
        raise ValueError("a shape or an offset is not a whole number")
    if dtype in DTYPES and nbytes != Entry.of(dtype, *shape).nbytes:
        raise ValueError("a shape does not fit its bytes")
    return begin, Entry(dtype, shape, nbytes)


def raw(tensor: Tensor) -> memoryview:
    """Return the numbers of a tensor on the CPU as bytes."""
    return tensor.flatten().view(torch.uint8).numpy().data


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors to a file atomically, one of them in CPU memory at a time.

    The same tensors and metadata give the same bytes. The safetensors library writes metadata in random order.

    Raises ``UserError`` for a type of number that is not among ``DTYPES``, where the disk is full, and where the folder
    cannot be written.
    """
    for name, value in tensors.items():
        if value.dtype not in NAMES:
            raise UserError(f"{name} is of type {value.dtype}, which a safetensors file cannot hold")
    # Wide numbers come first, as in the library, so that each tensor begins at a multiple of its number's width.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])))
    entries = {name: Entry.of(NAMES[value.dtype], *value.shape) for name, value in ordered.items()}
    write(path, entries, (raw(value.detach().cpu()) for value in ordered.values()), metadata)


def write(
    path: Path, entries: Mapping[str, Entry], contents: Iterable[bytes | memoryview], metadata: Mapping[str, str]
) -> str:
    """Write a file atomically and return the sha256 of its bytes.

    ``contents``: the bytes of ``entries`` one after the other, in pieces of any length. They may be computed while the
    file is written.

    Raises ``UserError`` where the disk is full or the folder cannot be written.
    """
    sha = hashlib.sha256()
    try:
        with files.replacing(path) as (made,), made.open("wb") as file:
            for piece in chain([_header(entries, metadata)], contents):
                sha.update(piece)
                file.write(piece)
                del piece  # The next piece may be computed in its memory.
    except OSError as error:
        raise files.refusal(path, error) from None
    return sha.hexdigest()


def _header(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """Return the length of the header and the header."""
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, entry in entries.items():
        begin, end = end, end + entry.nbytes
        fields[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [begin, end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text
