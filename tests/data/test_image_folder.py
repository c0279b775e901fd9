"""Image files in ImageNet's layout."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from spectrim.data.image_folder import MEAN, STD, ImageFolder
from spectrim.errors import UserError

COLOURS = {"cat": (255, 0, 0), "dog": (0, 0, 255)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for part, count in (("train", 5), ("val", 2)):
        for name, colour in COLOURS.items():
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (40 + number, 30), colour).save(folder / f"{number}.png")
    return tmp_path


def settings(root: Path, **others: int | str) -> ImageFolder:
    sizes: dict = {
        "held_out": 4,
        "calibration_size": 3,
        "verification_size": 0,
        "batch_size": 2,
        "image_size": 16,
        "resize": 20,
    }
    return ImageFolder(root=str(root), **(sizes | others))


def test_split_as_every_training_set_is(root: Path) -> None:
    splits = settings(root).load()
    assert [len(part.labels) for part in (splits.train, splits.calibration, splits.test)] == [6, 3, 4]
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    assert splits.train.labels.tolist() == (order[4:].sort().values >= 5).long().tolist()
    assert (splits.num_classes, splits.in_channels, splits.image_size) == (2, 3, 16)


def test_batches_are_normalised_and_can_be_iterated_again(root: Path) -> None:
    test = settings(root).load().test
    for _ in range(2):
        batches = list(test)
        assert [inputs.shape for inputs, _ in batches] == [(2, 3, 16, 16)] * len(test)
        assert torch.cat([targets for _, targets in batches]).tolist() == test.labels.tolist() == [0, 0, 1, 1]
        red = (torch.tensor([1.0, 0.0, 0.0]) - torch.tensor(MEAN)) / torch.tensor(STD)
        assert torch.allclose(batches[0][0][0, :, 8, 8], red)


def test_calibration_from_the_test_set(root: Path) -> None:
    splits = settings(root, calibration_size=4, calibration_from="test").load()
    assert splits.calibration.digest() == splits.test.digest()


def test_worker_processes_read_the_same(root: Path) -> None:
    plain, parallel = settings(root).load().test, settings(root, workers=1).load().test
    for (first, _), (second, _) in zip(plain, parallel, strict=True):
        assert first.equal(second)


def test_digest_follows_names_sizes_and_labels(root: Path) -> None:
    before = settings(root).load().digest
    assert settings(root).load().digest == before
    Image.new("RGB", (90, 90)).save(root / "val" / "cat" / "0.png")
    assert settings(root).load().digest != before


@pytest.mark.parametrize("workers", [0, 1])
def test_file_that_is_no_image(root: Path, workers: int) -> None:
    (root / "val" / "dog" / "1.png").write_bytes(b"nothing to see")
    with pytest.raises(UserError, match=r"^[^\n]*val/dog/1.png is not a readable image[^\n]*$"):
        list(settings(root, workers=workers).load().test)


def test_bad_folders(root: Path) -> None:
    with pytest.raises(UserError, match=r"data.root is not set"):
        ImageFolder().load()
    with pytest.raises(UserError, match="is not a folder"):
        settings(root / "nowhere").load()
    (root / "val" / "eel").mkdir()
    with pytest.raises(UserError, match="eel"):
        settings(root).load()
    Image.new("RGB", (20, 20)).save(root / "val" / "eel" / "0.png")
    with pytest.raises(UserError, match=r"train and val hold different classes \(eel\)"):
        settings(root).load()
    with pytest.raises(UserError, match=r"image_size must lie in 1..resize"):
        settings(root, image_size=21)
    with pytest.raises(UserError, match="workers"):
        settings(root, workers=-1)
