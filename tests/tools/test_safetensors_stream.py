"""What is written in pieces is what the safetensors library reads, and the other way round."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spectrim.errors import UserError
from spectrim.tools import safetensors_stream
from spectrim.tools.safetensors_stream import Entry, Shard


def tensors() -> dict[str, Any]:
    return {
        "half": torch.randn(3, 5).half(),
        "bfloat": torch.randn(7).bfloat16(),
        "double": torch.randn(2, 2, 2).double(),
        "count": torch.tensor(41),
        "mask": torch.tensor([True, False, True]),
        "none": torch.zeros(0, 4),
    }


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "x.safetensors", {"format": "pt"})
    shard = Shard.at(tmp_path / "x.safetensors")
    assert shard.entries.keys() == tensors().keys() and shard.metadata == {"format": "pt"}
    torch.manual_seed(0)
    for name, value in load_file(tmp_path / "x.safetensors").items():
        got = shard.read(name)
        assert got.dtype == value.dtype and torch.equal(got, value)
        assert b"".join(shard.pieces(name)) == bytes(safetensors_stream.raw(value))


def test_what_is_written_the_library_reads(tmp_path: Path) -> None:
    path, wanted = tmp_path / "x.safetensors", {"b": torch.randn(300, 4), "a": torch.randn(2, 3).bfloat16()}
    entries = {"b": Entry.of("F32", 300, 4), "a": Entry.of("BF16", 2, 3)}
    digest = safetensors_stream.write(path, entries, map(safetensors_stream.raw, wanted.values()), {"format": "pt"})
    assert all(torch.equal(value, wanted[name]) for name, value in load_file(path).items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"} and set(file.keys()) == {"a", "b"}
    assert digest == safetensors_stream.write(
        path, entries, map(safetensors_stream.raw, wanted.values()), {"format": "pt"}
    )


def test_saved_tensors_come_back_and_begin_at_a_multiple_of_their_width(tmp_path: Path) -> None:
    path, wanted = tmp_path / "x.safetensors", tensors() | {"turned": torch.randn(3, 5).T, "wave": torch.ones(2) * 1j}
    safetensors_stream.save(path, wanted, {"b": "ü", "a": "1"})
    found, shard = load_file(path), Shard.at(path)
    assert found.keys() == wanted.keys() and shard.metadata == {"b": "ü", "a": "1"}
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)
        assert torch.equal(shard.read(name), value) and shard.starts[name] % value.itemsize == 0


def test_a_type_that_the_format_lacks_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wave is of type torch.complex128, which a safetensors file cannot hold"):
        safetensors_stream.save(tmp_path / "x.safetensors", {"wave": torch.ones(2, dtype=torch.complex128)}, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", [0, 0.01, 0.2, 0.6, 0.99])
def test_a_file_cut_short_is_refused(tmp_path: Path, part: float) -> None:
    path = tmp_path / "x.safetensors"
    save_file(tensors(), path)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(UserError, match="cut short") as refusal:
        Shard.at(path)
    assert "\n" not in str(refusal.value)


HEADERS = [
    "[]",
    "{",
    '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
    '{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [8, 4]}}',
    '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
    '{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}',
    '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": 3}',
    '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": 3}',
]


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_that_is_none_is_refused(tmp_path: Path, header: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    with pytest.raises(UserError, match="x.safetensors is cut short or not a safetensors file"):
        Shard.at(path)


def test_other_types_of_number_are_copied_but_not_read(tmp_path: Path) -> None:
    path, entry = tmp_path / "x.safetensors", Entry("F6_E2M3", (4,), 3)
    safetensors_stream.write(path, {"a": entry}, [b"ab", b"c"], {})
    assert b"".join(Shard.at(path).pieces("a")) == b"abc"
    with pytest.raises(UserError, match="a is of type F6_E2M3; known are"):
        Shard.at(path).read("a")


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(tensors(), path)
    before = path.read_bytes()

    def contents() -> Any:
        yield b"half"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="cannot write .*x.safetensors: No space left on device; free some space"):
        safetensors_stream.write(path, {"a": Entry.of("F32", 2)}, contents(), {})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
