"""One readable ``fit`` and its schedule: SGD on image batches, resumable after a kill, the same on every resume."""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from spectrim.batches import forward
from spectrim.data.images import ImageSplit
from spectrim.errors import UserError
from spectrim.settings import settings


@settings
class Recipe:
    """How a net is trained.

    The learning rate rises linearly from ``lr / 10`` to ``lr`` over the first ``warmup`` fraction of the steps, then
    falls linearly to zero. Each image is flipped with probability ½ and cropped at its own offset out of itself padded
    by ``crop_padding`` zeros. ``image_sizes`` lists (fraction of the epochs, side in pixels): early epochs on smaller
    images cost less; the last entry should be the full side. ``precision`` is ``bfloat16`` (autocast) or ``float32``.
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

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or self.lr <= 0:
            raise UserError("a recipe needs epochs >= 1, batch_size >= 1 and lr > 0")
        if not 0 <= self.warmup < 1:
            raise UserError(f"warmup is a fraction of the training in [0, 1), got {self.warmup}")
        if any(len(pair) != 2 for pair in self.image_sizes):
            raise UserError(f"image_sizes are pairs (fraction of the epochs, side), got {self.image_sizes}")
        if self.precision not in ("bfloat16", "float32"):
            raise UserError(f"precision is bfloat16 or float32, got {self.precision}")

    def learning_rate(self, progress: float) -> float:
        """The learning rate after a fraction ``progress`` of the training."""
        if progress < self.warmup:
            return self.lr * (0.1 + 0.9 * progress / self.warmup)
        return self.lr * max(0.0, 1 - progress) / (1 - self.warmup)

    def image_size(self, epoch: int, full: int) -> int:
        """The side of the images in ``epoch`` (counted from 0), in pixels."""
        reached = 0.0
        for fraction, side in self.image_sizes:
            reached += fraction
            if epoch < round(reached * self.epochs):
                return int(side)
        return full


def augment(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Flip and crop every image by itself. uint8 (N, C, H, W) in, the same out."""
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


def fit(
    model: nn.Module,
    train: ImageSplit,
    recipe: Recipe,
    *,
    seed: int,
    state: Path | None = None,
    after_epoch: Callable[[int, nn.Module], dict] | None = None,
) -> list[dict]:
    """Train ``model`` in place and return its curve: one dict an epoch (epoch, loss, accuracy, lr, seconds, …).

    With ``state``, a safetensors file, everything needed to go on is written there after each epoch, whole or not at
    all; if it exists, training resumes from it. The data order depends on ``seed`` and the epoch alone, so a resumed
    run sees the batches that an unbroken one sees. ``after_epoch(epoch, model)`` adds its values to the curve.

    Raises ``FloatingPointError`` where the loss stops being finite; the last good state stays on disk. Raises
    ``UserError`` where ``state`` is cut short or of another training.
    """
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.momentum > 0
    )
    curve = _resume(state, model, optimizer, recipe, seed) if state else []
    left = range(len(curve), recipe.epochs)
    with tqdm(left, "train", initial=len(curve), total=recipe.epochs, unit="epoch", disable=None) as bar:
        for epoch in bar:
            started = time.perf_counter()
            point = {"epoch": epoch, **_epoch(model, train, recipe, optimizer, epoch, seed)}
            point["seconds"] = round(time.perf_counter() - started, 2)
            if after_epoch:
                point |= after_epoch(epoch, model)
            curve.append(point)
            bar.set_postfix(loss=f"{point['loss']:.4f}", accuracy=f"{point['accuracy']:.4f}")
            if bar.disable:  # not on a terminal: one line an epoch
                print(f"epoch {epoch + 1}/{recipe.epochs}: loss {point['loss']:.4f}, accuracy {point['accuracy']:.4f}")
            if state:
                _save_state(state, model, optimizer, curve, recipe, seed)
    return curve


def _epoch(
    model: nn.Module, train: ImageSplit, recipe: Recipe, optimizer: torch.optim.Optimizer, epoch: int, seed: int
) -> dict:
    model.train()
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    order = torch.randperm(len(train.labels), generator=generator)
    steps = max(1, len(order) // recipe.batch_size)
    side = recipe.image_size(epoch, train.images.shape[-1])
    total = correct = seen = 0.0
    for step in range(steps):
        chosen = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
        inputs = train.normalise(augment(train.images[chosen], recipe, generator))
        if side != inputs.shape[-1]:
            inputs = F.interpolate(inputs, size=(side, side), mode="area")
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        targets = train.labels[chosen]
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate((epoch + step / steps) / recipe.epochs)
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            logits = forward(model, inputs)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=recipe.label_smoothing)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the training loss became {loss.item()} in epoch {epoch}, step {step}; lower lr")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += loss.item() * len(targets)
        correct += (logits.argmax(1) == targets).sum().item()
        seen += len(targets)
    return {"loss": total / seen, "accuracy": correct / seen, "lr": optimizer.param_groups[0]["lr"], "side": side}


def _fingerprint(recipe: Recipe, seed: int) -> str:
    return json.dumps({"recipe": asdict(recipe), "seed": seed}, sort_keys=True)


def _save_state(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, curve: Sequence[dict], recipe: Recipe, seed: int
) -> None:
    tensors = {f"model.{name}": value.detach().contiguous() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        buffer = optimizer.state[parameter].get("momentum_buffer")
        if buffer is not None:
            tensors[f"momentum.{name}"] = buffer.contiguous()
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, {"curve": json.dumps(list(curve)), "run": _fingerprint(recipe, seed)})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written ({error}); the state of the epoch before is kept") from None


def _resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, seed: int) -> list[dict]:
    if not path.exists():
        return []
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path} is cut short or not a training's state ({error}); remove it to start anew") from None
    if metadata.get("run") != _fingerprint(recipe, seed):
        raise UserError(f"{path} belongs to a training with other settings; remove it or restore those settings")
    tensors = load_file(path)
    model.load_state_dict({key[6:]: value for key, value in tensors.items() if key.startswith("model.")})
    for name, parameter in model.named_parameters():
        if f"momentum.{name}" in tensors:
            optimizer.state[parameter]["momentum_buffer"] = tensors[f"momentum.{name}"]
    return json.loads(metadata["curve"])
