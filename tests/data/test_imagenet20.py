"""The twenty images of ImageNet and the enlarged ones of CIFAR-10, on made-up files of the same names."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from spectrim.data import imagenet20, upscaled_cifar10
from spectrim.data.imagenet20 import ImageNet20
from spectrim.data.sources import Arrays
from spectrim.data.upscaled_cifar10 import UpscaledCIFAR10
from spectrim.errors import UserError
from spectrim.tools.imagenet import MEAN, STD


@pytest.fixture
def _images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, name in enumerate(sorted(imagenet20.SHA256)):
        Image.new("RGB", (48, 32), (12 * index, 0, 0)).save(tmp_path / name, quality=100)
    monkeypatch.setattr(imagenet20, "unpacked", lambda bundle: tmp_path)


@pytest.mark.usefixtures("_images")
def test_labels_are_those_of_the_names_and_all_images_are_in_every_split() -> None:
    splits = ImageNet20(image_size=16, resize=20).load()
    assert splits.test.labels.tolist()[:3] == [243, 559, 438] and splits.test.labels.tolist()[-1] == 305
    for part in (splits.train, splits.calibration, splits.test):
        assert part.labels.tolist() == splits.test.labels.tolist()
    assert len(splits.verification.labels) == 0 and splits.num_classes == 1000
    red = torch.cat([inputs for inputs, _ in splits.test])[:, 0, 8, 8]
    assert red.shape == (20,) and (red.diff() > 0).all()  # in the order of the labels


@pytest.mark.usefixtures("_images")
def test_held_out_images_can_be_calibrated_on() -> None:
    splits = ImageNet20(16, 0, held_out=16, calibration_from="held_out", image_size=16, resize=20).load()
    assert len(splits.calibration.labels) == 16 and len(splits.train.labels) == 4
    with pytest.raises(UserError, match="image_size must lie in 1..resize"):
        ImageNet20(image_size=300)


def test_enlarged_images_keep_their_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 32, 32).contiguous()
    arrays = Arrays(images, torch.tensor([1, 2, 3]), images, torch.tensor([7, 8, 9]))
    monkeypatch.setattr(upscaled_cifar10, "load", lambda source: arrays)
    splits = UpscaledCIFAR10(calibration_size=1, test_size=2, image_size=48).load()
    ((inputs, labels),) = list(splits.test)
    assert inputs.shape == (2, 3, 48, 48) and labels.tolist() == [7, 8]
    wanted = (torch.tensor([0, 0.2]).view(2, 1) - torch.tensor(MEAN)) / torch.tensor(STD)
    assert torch.allclose(inputs[:, :, 20, 20], wanted)
    with pytest.raises(UserError, match="test_size must lie in 1..10000, got 0"):
        UpscaledCIFAR10(test_size=0)
