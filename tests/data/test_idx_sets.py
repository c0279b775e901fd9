"""MNIST and Fashion-MNIST: the idx format, and the archives it comes in."""

import gzip
import io
import struct
import tarfile
from pathlib import Path

import pytest
import torch

from spectrim.data import fashion_mnist, idx, mnist, public


def encode(array: torch.Tensor) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.numpy().tobytes()


@pytest.fixture
def contents() -> list[bytes]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> bytes:
        return encode(torch.randint(0, 10, shape, generator=generator).to(torch.uint8))

    return [random(6, 4, 4), random(6), random(2, 4, 4), random(2)]


def archive(members: dict[str, bytes], mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_idx_round_trip() -> None:
    array = torch.arange(24, dtype=torch.uint8).view(2, 3, 4)
    assert idx.parse(encode(array)).equal(array)
    with pytest.raises(ValueError, match="not an idx file"):
        idx.parse(encode(array)[:-1])


def test_every_route_of_both_sets_gives_the_same_arrays(tmp_path: Path, contents: list[bytes]) -> None:
    expected = idx.arrays_of(contents)
    assert expected.train_images.shape == (6, 1, 4, 4)
    assert expected.test_labels.dtype == torch.int64

    gzipped = [tmp_path / name for name in idx.FILES]
    for path, content in zip(gzipped, contents, strict=True):
        path.write_bytes(gzip.compress(content))
    assert idx.decode_gzipped(gzipped).sha256() == expected.sha256()

    npm = tmp_path / "mnist.tgz"
    names = [f"package/data/{name.removesuffix('.gz')}" for name in idx.FILES]
    npm.write_bytes(archive(dict(zip(names, contents, strict=True)), "w:gz"))
    assert mnist._decode_package([npm]).sha256() == expected.sha256()

    deb = tmp_path / "fashion.deb"
    names = [f"./usr/share/datasets/fashion-mnist/{name}" for name in idx.FILES]
    data = archive(dict(zip(names, (gzip.compress(content) for content in contents), strict=True)), "w:xz")
    deb.write_bytes(b"!<arch>\n" + ar_member("debian-binary", b"2.0") + ar_member("data.tar.xz", data))
    assert fashion_mnist._decode_package([deb]).sha256() == expected.sha256()


def ar_member(name: str, content: bytes) -> bytes:
    header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
    return header + content + b"\n" * (len(content) % 2)


def test_archive_without_data() -> None:
    with pytest.raises(ValueError, match="no member"):
        fashion_mnist._ar_member(b"!<arch>\n" + ar_member("debian-binary", b"2.0"), b"data.tar")


@pytest.mark.parametrize("module", [mnist, fashion_mnist])
def test_loaded_with_the_settings_asked_for(module, contents, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(public, "load", lambda source: idx.arrays_of(contents) if source is module.SOURCE else None)
    data = {mnist: mnist.MNIST, fashion_mnist: fashion_mnist.FashionMNIST}[module]
    splits = data(held_out=3, calibration_size=2, verification_size=0).load()
    assert [len(part.labels) for part in (splits.train, splits.calibration, splits.test)] == [3, 2, 2]
    assert splits.name == module.SOURCE.name
