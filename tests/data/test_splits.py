"""How a data set is split."""

import hashlib

import pytest
import torch

from spectrim.data.digits import Digits
from spectrim.data.images import Splits
from spectrim.data.sources import Arrays
from spectrim.data.splits import ImageData, digest_if_known, draw_indices, split_arrays
from spectrim.errors import UserError
from spectrim.tools.settings import settings

TRAIN, TEST = 40, 12


@settings
class Numbered(ImageData):
    """Images whose label is their number; the test set's numbers begin at 1000."""

    verification_size: int = 0

    def load(self) -> Splits:
        images = torch.zeros(TRAIN, 1, 2, 2, dtype=torch.uint8)
        arrays = Arrays(images, torch.arange(TRAIN), images[:TEST], 1000 + torch.arange(TEST))
        return split_arrays(self, arrays, "numbered", (0.0,), (1.0,))


def numbers(data: ImageData) -> tuple[list[int], list[int], list[int]]:
    splits = data.load()
    return splits.train.labels.tolist(), splits.calibration.labels.tolist(), splits.test.labels.tolist()


def test_train_and_held_out_are_the_two_parts_of_one_fixed_order() -> None:
    order = torch.randperm(TRAIN, generator=torch.Generator().manual_seed(0)).tolist()
    train, calibration, test = numbers(Numbered(held_out=10, calibration_size=10))
    assert calibration == sorted(order[:10])
    assert train == sorted(order[10:])
    assert test == list(range(1000, 1000 + TEST))


def test_calibration_is_drawn_by_its_own_seed_from_the_held_out_pool() -> None:
    pool = sorted(torch.randperm(TRAIN, generator=torch.Generator().manual_seed(0)).tolist()[:10])
    chosen = torch.randperm(10, generator=torch.Generator().manual_seed(3)).tolist()[:4]
    train, calibration, _ = numbers(Numbered(held_out=10, calibration_size=4, calibration_seed=3))
    assert calibration == sorted(pool[index] for index in chosen)
    other_train, other, _ = numbers(Numbered(held_out=10, calibration_size=4, calibration_seed=4))
    assert other != calibration
    assert other_train == train


@pytest.mark.parametrize("pool", ["held_out", "train", "test"])
def test_verification_is_of_the_same_pool_and_disjoint_from_calibration(pool: str) -> None:
    data = Numbered(held_out=10, calibration_size=4, verification_size=5, calibration_from=pool)
    splits = data.load()
    train, test = set(splits.train.labels.tolist()), set(splits.test.labels.tolist())
    members = {"held_out": set(range(TRAIN)) - train, "train": train, "test": test}[pool]
    calibration, verification = splits.calibration.labels.tolist(), splits.verification.labels.tolist()
    assert set(verification) <= members - set(calibration)
    assert len(set(verification)) == 5
    assert verification == sorted(verification)
    without = Numbered(held_out=10, calibration_size=4, calibration_from=pool).load()
    assert calibration == without.calibration.labels.tolist()  # asking for one does not move the other
    assert len(without.verification.labels) == 0


@pytest.mark.parametrize("pool", ["held_out", "train", "test"])
def test_calibration_comes_from_the_named_pool_without_repetition(pool: str) -> None:
    train, calibration, test = numbers(Numbered(held_out=10, calibration_size=9, calibration_from=pool))
    members = {"held_out": set(range(TRAIN)) - set(train), "train": set(train), "test": set(test)}[pool]
    assert set(calibration) <= members
    assert len(set(calibration)) == 9
    assert calibration == sorted(calibration)


def test_only_a_split_has_a_known_digest() -> None:
    train = Numbered(held_out=10, calibration_size=5).load().train
    assert digest_if_known(train) == train.digest() and digest_if_known(list(train)) is None


def test_digest_is_over_the_four_digests() -> None:
    splits = Numbered(held_out=10, calibration_size=4).load()
    parts = (splits.train, splits.calibration, splits.verification, splits.test)
    joined = "".join(part.digest() for part in parts)
    assert splits.digest == hashlib.sha256(joined.encode()).hexdigest()
    assert splits.digest != Numbered(held_out=10, calibration_size=5).load().digest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calibration_size": 0}, "calibration_size must be at least 1, got 0"),
        ({"verification_size": -1}, "verification_size must be at least 0, got -1"),
        ({"calibration_size": -5}, "calibration_size must be at least 1, got -5"),
        ({"calibration_size": "many"}, "calibration_size"),
        ({"calibration_from": "validation"}, "calibration_from is one of held_out, train, test, got 'validation'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_settings_out_of_range(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Digits(**arguments)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Numbered(held_out=10, calibration_size=11), "calibration_size 11 is more than the 10 images of held_out"),
        (
            Numbered(held_out=10, calibration_size=6, verification_size=5),
            "6 with verification_size 5 is more than the 10",
        ),
        (Numbered(held_out=0, calibration_size=1), "more than the 0 images of held_out"),
        (Numbered(held_out=10, calibration_size=13, calibration_from="test"), "more than the 12 images of test"),
        (Numbered(held_out=TRAIN, calibration_size=1), "held_out must lie in 0..39"),
        (Numbered(held_out=-1, calibration_size=1), "held_out must lie in 0..39"),
    ],
)
def test_pools_too_small(data: ImageData, message: str) -> None:
    with pytest.raises(UserError, match=message):
        draw_indices(data, TRAIN, TEST)
