"""One readable ``fit`` and its schedule: SGD, resumable after a kill, the same on every resume."""

import math
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence, Sized
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from spectrim.batches import Batches, Inputs, device_of, forward, pairs, sample_count, to_device
from spectrim.data.images import ImageSplit
from spectrim.data.text import TextSplit
from spectrim.errors import UserError
from spectrim.losses import Loss, are_scores, logits_of
from spectrim.tools.settings import settings
from spectrim.training import saved_state
from spectrim.training.cuda_graph import Replayed, own_stream

# Called after each epoch with its number, the model and the optimizer, both of which it may change.
AfterEpoch = Callable[[int, nn.Module, torch.optim.SGD], dict[str, Any]]
# Further terms of the loss in an epoch by name, each with its weight in it.
Penalties = Callable[[int], dict[str, Tensor]]
BeforeStep = Callable[[], Hashable]


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
        if self.epochs < 1 or self.batch_size < 1 or not 0 < self.lr < math.inf:
            raise UserError("a recipe needs epochs >= 1, batch_size >= 1 and a finite lr > 0")
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
    train: Batches,
    recipe: Recipe,
    *,
    seed: int,
    loss: Loss = F.cross_entropy,
    penalties: Penalties = lambda epoch: {},
    before_step: BeforeStep = lambda: None,
    undecayed: Collection[str] = (),
    state: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    after_epoch: AfterEpoch | None = None,
) -> list[dict]:
    """Train ``model`` in place and return its curve: one dict an epoch (epoch, loss, accuracy, lr, seconds, …).

    ``train``: images held in memory, shuffled and augmented as ``recipe`` says; texts, shuffled; or any batches
    (inputs, targets) that have a length, taken as they come. ``penalties`` are added to the loss; the curve holds the
    mean of each. A step need not be like the one before it: ``before_step`` may change what the next one does, and says
    which of several kinds that is. Nothing else may: on a GPU a step is recorded.
    ``undecayed``: names of parameters without weight decay. What ``after_epoch`` returns is added to the curve.

    With ``state``, a safetensors file, everything needed to go on is written there after each epoch, whole or not at
    all; if it exists, training resumes from it. ``identity``: what else than recipe, seed, the shapes of the model and
    the images makes it this training.
    The order of images, and what the model draws (dropout, random gates), depend on ``seed`` and the epoch alone, so a
    resumed run is an unbroken one; the caller's random numbers are left alone.

    Raises ``FloatingPointError`` where the loss stops being finite; the last good state stays on disk. Raises
    ``UserError`` where ``state`` is cut short or of another training.
    """
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = _optimizer(model, recipe, undecayed)
    if loss is F.cross_entropy:
        loss = partial(_smoothed, label_smoothing=recipe.label_smoothing)
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    data = train.digest() if isinstance(train, ImageSplit | TextSplit) and state else None
    run = saved_state.fingerprint(recipe, seed, {**(identity or {}), "shapes": shapes, "data": data})
    curve = saved_state.resume(state, model, optimizer, run) if state else []
    left = range(len(curve), recipe.epochs)
    bar = tqdm(left, "train", initial=len(curve), total=recipe.epochs, unit="epoch", disable=None)
    with bar, torch.random.fork_rng(), own_stream(device_of(model)):
        for epoch in bar:
            started = time.perf_counter()
            torch.manual_seed(_seed_of(seed, epoch))
            batches = _batches(train, recipe, epoch, seed)
            means = _epoch(model, batches, recipe, optimizer, epoch, loss, penalties, before_step)
            point = {"epoch": epoch, **means, "seconds": round(time.perf_counter() - started, 2)}
            if isinstance(train, ImageSplit):
                point["side"] = recipe.image_size(epoch, train.images.shape[-1])
            if after_epoch:
                point |= after_epoch(epoch, model, optimizer)
            curve.append(point)
            said = {key: f"{value:.4f}" for key in ("loss", "accuracy") if (value := point[key]) is not None}
            bar.set_postfix(said)
            if bar.disable:  # not on a terminal: one line an epoch
                print(f"epoch {epoch + 1}/{recipe.epochs}: {', '.join(f'{k} {v}' for k, v in said.items())}")
            if state:
                saved_state.save(state, model, optimizer, curve, run)
    return curve


def _seed_of(seed: int, epoch: int) -> int:
    return seed * 100_003 + epoch


def _smoothed(outputs: Any, targets: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(logits_of(outputs).float(), targets, label_smoothing=label_smoothing)


def _optimizer(model: nn.Module, recipe: Recipe, undecayed: Collection[str]) -> torch.optim.SGD:
    decayed = [parameter for name, parameter in model.named_parameters() if name not in undecayed]
    spared = [parameter for name, parameter in model.named_parameters() if name in undecayed]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        recipe.lr,
        recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.momentum > 0,
    )


def _batches(train: Batches, recipe: Recipe, epoch: int, seed: int) -> tuple[int, Iterable[tuple[Inputs, Any]]]:
    """How many batches an epoch has, and the batches."""
    if not isinstance(train, ImageSplit | TextSplit):
        if not isinstance(train, Sized):
            raise UserError("the train set has no length, which the learning rate needs; give a list or a DataLoader")
        return len(train), pairs(train, "train")
    generator = torch.Generator().manual_seed(_seed_of(seed, epoch))
    order = torch.randperm(len(train.labels), generator=generator)
    steps = max(1, len(order) // recipe.batch_size)
    if isinstance(train, TextSplit):
        return steps, map(train.at, order.split(recipe.batch_size)[:steps])
    side = recipe.image_size(epoch, train.images.shape[-1])

    def drawn(chosen: Tensor) -> tuple[Tensor, Tensor]:
        inputs = train.normalise(augment(train.images[chosen], recipe, generator))
        if side != inputs.shape[-1]:
            inputs = F.interpolate(inputs, size=(side, side), mode="area")
        return inputs.contiguous(memory_format=torch.channels_last), train.labels[chosen]

    return steps, map(drawn, order.split(recipe.batch_size)[:steps])


def _epoch(
    model: nn.Module,
    batches: tuple[int, Iterable[tuple[Inputs, Any]]],
    recipe: Recipe,
    optimizer: torch.optim.SGD,
    epoch: int,
    loss: Loss,
    penalties: Penalties,
    before_step: BeforeStep,
) -> dict[str, Any]:
    model.train()
    device, steps = device_of(model), batches[0]
    step_of = Replayed(partial(_step, model, recipe, optimizer, lambda: penalties(epoch), loss), model.parameters())
    sums: dict[str, float] = {}
    correct, seen, scored = torch.zeros((), device=device), 0, True
    for step, (inputs, targets) in enumerate(batches[1]):
        inputs, targets = to_device(inputs, device), to_device(targets, device)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate((epoch + step / steps) / recipe.epochs)
        names, values, outputs = step_of(inputs, targets, before_step())
        terms = values.tolist()
        if not all(map(math.isfinite, terms)):
            raise FloatingPointError(f"the training loss became {sum(terms)} in epoch {epoch}, step {step}; lower lr")
        optimizer.step()
        count = sample_count(targets, inputs)
        for name, term in zip(names, terms, strict=True):
            sums[name] = sums.get(name, 0.0) + term * count
        scored = scored and are_scores(outputs, targets)
        if scored:
            correct += (logits_of(outputs).argmax(1) == targets).sum()
        seen += count
    if not seen:
        raise UserError("the train set is empty; give at least one batch of (inputs, targets)")
    means = {name: value / seen for name, value in sums.items()}
    return {**means, "accuracy": correct.item() / seen if scored else None, "lr": optimizer.param_groups[0]["lr"]}


def _step(
    model: nn.Module,
    recipe: Recipe,
    optimizer: torch.optim.SGD,
    penalties: Callable[[], dict[str, Tensor]],
    loss: Loss,
    inputs: Inputs,
    targets: Any,
) -> tuple[list[str], Tensor, Any]:
    """The gradient of a batch; the terms of the loss by name and value, and the outputs."""
    optimizer.zero_grad(set_to_none=True)
    # Weights in half precision are made anew at each use, as a recording needs it: each is used once.
    with torch.autocast(device_of(model).type, torch.bfloat16, recipe.precision == "bfloat16", cache_enabled=False):
        outputs = forward(model, inputs)
    outputs = outputs.float() if isinstance(outputs, Tensor) else outputs
    terms = {"loss": loss(outputs, targets), **penalties()}
    values = torch.stack(list(terms.values()))
    values.sum().backward()
    return list(terms), values.detach(), outputs
