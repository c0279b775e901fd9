"""The digits that ship inside scikit-learn."""

import torch
from sklearn.datasets import load_digits

from spectrim.data.digits import Digits


def test_sizes_and_shape() -> None:
    splits = Digits().load()
    assert [len(part.labels) for part in (splits.train, splits.calibration, splits.test)] == [1138, 200, 359]
    assert (splits.num_classes, splits.in_channels, splits.image_size) == (10, 1, 8)
    assert set(splits.test.labels.tolist()) == set(range(10))


def test_every_image_is_in_one_part_only() -> None:
    splits = Digits(calibration_size=300, verification_size=0).load()
    parts = (splits.train, splits.calibration, splits.test)
    images = torch.cat([inputs for part in parts for inputs, _ in part]).double()
    bunch = torch.from_numpy(load_digits().images)
    restored = ((images * 0.3756 + 0.3055) * 16).round().squeeze(1)
    assert sorted(restored.flatten(1).tolist()) == sorted(bunch.flatten(1).tolist())


def test_normalised() -> None:
    images = torch.cat([inputs for inputs, _ in Digits().load().train])
    assert abs(images.mean().item()) < 0.01
    assert abs(images.std().item() - 1) < 0.01


def test_test_split_does_not_depend_on_the_settings() -> None:
    first, second = Digits().load(), Digits(calibration_size=7, calibration_seed=5, held_out=110, batch_size=9).load()
    assert first.test.digest() == second.test.digest()
    assert first.digest != second.digest
