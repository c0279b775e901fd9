"""Augmentation moves and mirrors images."""

import torch
from torch import Tensor, nn

from spectrim.training.recipe import Recipe
from spectrim.training.train_batches import augment


def test_augmentation_moves_and_mirrors_but_invents_nothing() -> None:
    pixels = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8).expand(200, -1, -1, -1)
    recipe, generator = Recipe(1, crop_padding=2), torch.Generator().manual_seed(0)
    changed = augment(pixels, recipe, generator)
    assert changed.shape == pixels.shape and changed.dtype == torch.uint8
    padded = nn.functional.pad(pixels[0, 0], (2,) * 4)
    windows = {tuple(w.flatten().tolist()) for image in (padded, padded.flip(1)) for w in every_window(image, 8)}
    assert {tuple(image.flatten().tolist()) for image in changed} <= windows
    assert torch.equal(augment(pixels, Recipe(1, crop_padding=0, flip=False), generator), pixels)


def every_window(image: Tensor, side: int) -> list[Tensor]:
    return [*image.unfold(0, side, 1).unfold(1, side, 1).reshape(-1, side, side)]
