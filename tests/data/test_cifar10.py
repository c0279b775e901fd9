"""CIFAR-10: both routes decode to the same images and labels."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spectrim.data import cifar10, public
from spectrim.data.sources import Arrays

ROWS = 3


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


@pytest.fixture
def batches() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(0)
    names = (*cifar10.TRAIN_BATCHES, "test_batch")
    return {
        name: (random.integers(0, 256, (ROWS, 3, 32, 32), np.uint8), random.integers(0, 10, ROWS)) for name in names
    }


@pytest.fixture
def binary(tmp_path: Path, batches: dict) -> Path:
    path = tmp_path / "binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, (images, labels) in batches.items():
            rows = np.concatenate([labels.astype(np.uint8)[:, None], images.reshape(ROWS, -1)], 1)
            add(archive, f"cifar-10-batches-bin/{name}.bin", rows.tobytes())
    return path


@pytest.fixture
def package(tmp_path: Path, batches: dict) -> Path:
    path = tmp_path / "package.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, (images, _) in batches.items():
            png = io.BytesIO()
            Image.fromarray(images.transpose(0, 2, 3, 1).reshape(ROWS, 1024, 3)).save(png, "png")
            add(archive, f"package/{name}.png", png.getvalue())
        train = [int(label) for name in cifar10.TRAIN_BATCHES for label in batches[name][1]]
        add(archive, "package/train_lables.json", json.dumps(train).encode())
        add(archive, "package/test_lables.json", json.dumps(batches["test_batch"][1].tolist()).encode())
    return path


def test_both_routes_give_the_same_arrays(binary: Path, package: Path, batches: dict) -> None:
    first, second = cifar10._decode_binary([binary]), cifar10._decode_package([package])
    assert first.sha256() == second.sha256()
    assert first.train_images.shape == (5 * ROWS, 3, 32, 32)
    assert first.train_labels.dtype == torch.int64
    assert first.test_images.numpy().tolist() == batches["test_batch"][0].tolist()


def test_loaded_with_the_settings_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(source: object) -> Arrays:
        assert source is cifar10.SOURCE
        images = torch.zeros(30, 3, 32, 32, dtype=torch.uint8)
        labels = torch.arange(30) % 10
        return Arrays(images, labels, images[:10], labels[:10])

    monkeypatch.setattr(public, "load", fake)
    splits = cifar10.CIFAR10(held_out=12, calibration_size=5, verification_size=0, batch_size=4).load()
    assert [len(part.labels) for part in (splits.train, splits.calibration, splits.test)] == [18, 5, 10]
    assert (splits.num_classes, splits.in_channels, splits.image_size) == (10, 3, 32)
    inputs, _ = next(iter(splits.test))
    assert inputs[0, :, 0, 0].tolist() == pytest.approx([-0.4914 / 0.2470, -0.4822 / 0.2435, -0.4465 / 0.2616])
