"""Image sets held in memory."""

import hashlib

import pytest
import torch

from spectrim.data.images import ImageSplit
from spectrim.errors import UserError


def make(count: int = 7, batch_size: int = 3) -> ImageSplit:
    images = torch.randint(0, 256, (count, 2, 4, 4), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    return ImageSplit(images, torch.arange(count), (0.5, 0.25), (0.5, 1.0), batch_size)


def test_batches_cover_the_set_in_order_again_and_again() -> None:
    split = make()
    for _ in range(2):
        batches = list(split)
        assert [len(targets) for _, targets in batches] == [3, 3, 1]
        assert len(split) == 3
        assert torch.cat([targets for _, targets in batches]).equal(split.labels)
        assert torch.cat([inputs for inputs, _ in batches]).equal(split.normalise(split.images))


def test_normalisation_of_black_and_white() -> None:
    split = make()
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 2, 1, 1)
    assert split.normalise(ends).flatten(1).tolist() == [[-1.0, -0.25], [1.0, 0.75]]


def test_digest_is_that_of_the_bytes() -> None:
    split = make()
    expected = hashlib.sha256(split.images.numpy().tobytes() + split.labels.numpy().tobytes()).hexdigest()
    assert split.digest() == expected
    assert split.subset(torch.tensor([1, 0]), "two").digest() != split.subset(torch.tensor([0, 1]), "two").digest()


def test_bad_sets() -> None:
    split = make()
    with pytest.raises(UserError, match="uint8"):
        ImageSplit(split.images.float(), split.labels, split.mean, split.std)
    with pytest.raises(UserError, match="7 images but 6 labels"):
        ImageSplit(split.images, split.labels[:6], split.mean, split.std)
    with pytest.raises(UserError, match="batch_size"):
        make(batch_size=0)
