"""The recipe of a training: its length, its learning rate and its augmentation."""

import math
from collections.abc import Sequence

from spectrim.errors import UserError
from spectrim.tools.settings import settings


@settings
class Recipe:
    """How a network is trained.

    The learning rate rises linearly from ``lr / 10`` to ``lr``, then falls linearly to zero.

    ``momentum``: of SGD (Nesterov); of AdamW the decay of the mean gradient.
    ``weight_decay``: of SGD a part of the gradient; of AdamW a part of the step (decoupled).
    ``warmup``: fraction of the steps in which the learning rate rises.
    ``flip``: whether each image is flipped with probability ½.
    ``crop_padding``: number of zeros around each image, from which it is cropped at a random offset.
    ``image_sizes``: pairs (fraction of the epochs, side in pixels). Early epochs on smaller images cost less. Epochs
    after the last pair use the full side.
    ``precision``: ``bfloat16`` (autocast) or ``float32``.
    ``optimizer``: ``sgd`` or ``adamw``. Convolutions take the first, transformers the second.
    """

    epochs: int
    lr: float = 0.2
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.2
    label_smoothing: float = 0.0
    flip: bool = True
    crop_padding: int = 4
    image_sizes: Sequence[Sequence[float]] = ()
    precision: str = "bfloat16"
    optimizer: str = "sgd"

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or not 0 < self.lr < math.inf:
            got = f"{self.epochs}, {self.batch_size}, {self.lr}"
            raise UserError(f"a recipe needs epochs >= 1, batch_size >= 1 and a finite lr > 0, got {got}")
        if not (0 <= self.momentum < 1 and 0 <= self.label_smoothing < 1):
            raise UserError(f"momentum and label_smoothing lie in [0, 1), got {self.momentum}, {self.label_smoothing}")
        if not 0 <= self.weight_decay < math.inf or self.crop_padding < 0:
            raise UserError(
                f"weight_decay and crop_padding are at least 0, got {self.weight_decay}, {self.crop_padding}"
            )
        if not 0 <= self.warmup < 1:
            raise UserError(f"warmup is a fraction of the training in [0, 1), got {self.warmup}")
        if any(len(pair) != 2 or not 0 <= pair[0] <= 1 or pair[1] < 1 for pair in self.image_sizes):
            raise UserError(
                f"image_sizes are pairs (fraction of the epochs, side of 1 or more), got {self.image_sizes}"
            )
        if self.precision not in ("bfloat16", "float32"):
            raise UserError(f"precision is bfloat16 or float32, got {self.precision}")
        if self.optimizer not in ("sgd", "adamw"):
            raise UserError(f"optimizer is sgd or adamw, got {self.optimizer}")

    def learning_rate(self, progress: float) -> float:
        """Return the learning rate after a fraction ``progress`` of the training."""
        if progress < self.warmup:
            return self.lr * (0.1 + 0.9 * progress / self.warmup)
        return self.lr * max(0.0, 1 - progress) / (1 - self.warmup)

    def image_size(self, epoch: int, full: int) -> int:
        """Return the side of the images in ``epoch``, in pixels. Epochs count from 0."""
        reached = 0.0
        for fraction, side in self.image_sizes:
            reached += fraction
            if epoch < round(reached * self.epochs):
                return int(side)
        return full
