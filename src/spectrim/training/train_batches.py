"""The batches of one epoch of a training, shuffled and augmented by a seed."""

from collections.abc import Iterable, Sized
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spectrim.batches import Batches, Inputs, pairs
from spectrim.data.images import ImageSplit
from spectrim.data.text import TextSplit
from spectrim.errors import UserError
from spectrim.training.recipe import Recipe


def epoch_batches(train: Batches, recipe: Recipe, epoch: int, seed: int) -> tuple[int, Iterable[tuple[Inputs, Any]]]:
    """Return the number of batches of an epoch, and the batches.

    Images are shuffled and augmented, texts are shuffled. Other batches keep their order.

    ``epoch``: number of the epoch, from 0, which decides the size of the images.
    ``seed``: seed of this epoch's random numbers.
    Raises ``UserError`` for batches that have no length.
    """
    if not isinstance(train, ImageSplit | TextSplit):
        if not isinstance(train, Sized):
            raise UserError("the train split has no length, which the learning rate needs; give a list or a DataLoader")
        return len(train), pairs(train, "train")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train.labels), generator=generator)
    steps = max(1, len(order) // recipe.batch_size)
    if isinstance(train, TextSplit):
        return steps, map(train.at, order.split(recipe.batch_size)[:steps])
    side = recipe.image_size(epoch, train.images.shape[-1])

    def augmented(chosen: Tensor) -> tuple[Tensor, Tensor]:
        inputs = train.normalise(augment(train.images[chosen], recipe, generator))
        if side != inputs.shape[-1]:
            inputs = F.interpolate(inputs, size=(side, side), mode="area")
        return inputs.contiguous(memory_format=torch.channels_last), train.labels[chosen]

    return steps, map(augmented, order.split(recipe.batch_size)[:steps])


def augment(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Flip and crop each image separately. Takes and returns uint8 images of shape (N, C, H, W)."""
    count, _, height, width = images.shape
    pad = recipe.crop_padding
    if pad:
        windows = F.pad(images, (pad,) * 4).unfold(2, height, 1).unfold(3, width, 1)
        offsets = torch.randint(0, 2 * pad + 1, (2, count), generator=generator)
        images = windows[torch.arange(count), :, offsets[0], offsets[1]]
    if recipe.flip:
        flipped = torch.rand(count, generator=generator) < 0.5
        images = torch.where(flipped.view(-1, 1, 1, 1), images.flip(3), images)
    return images
