"""The training loop, which resumes after a kill and then ends in the same weights as an unbroken training."""

import math
import time
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.batches import Batches, Inputs, device_of, forward, target_count, to_device
from spectrim.data.images import ImageSplit
from spectrim.data.splits import digest_if_known
from spectrim.errors import UserError
from spectrim.losses import Loss, are_scores, logits_of
from spectrim.tools.live import Bar
from spectrim.tools.settings import require_seed
from spectrim.training.cuda_graph import Replayed, own_stream
from spectrim.training.recipe import Recipe
from spectrim.training.saved_state import StateFile
from spectrim.training.train_batches import epoch_batches


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    ``seed``: with the number of the epoch it determines the order of the samples, their augmentation and what the
    model draws at random (dropout, random gates).
    ``loss``: the mean over a batch. ``F.cross_entropy`` is smoothed as the recipe says.
    ``undecayed``: names of the parameters without weight decay.
    """

    recipe: Recipe
    seed: int
    loss: Loss = F.cross_entropy
    undecayed: Collection[str] = ()

    def __post_init__(self) -> None:
        require_seed("seed", self.seed)

    def seed_of(self, epoch: int) -> int:
        """Return the seed of one epoch."""
        return self.seed * 100_003 + epoch


def _no_penalties(epoch: int) -> dict[str, Tensor]:
    return {}


def _same_step() -> None:
    return None


def _nothing(epoch: int, model: nn.Module, optimizer: torch.optim.SGD) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Callbacks:
    """What a method that selects while it trains adds to the training loop.

    ``penalties``: epoch → further terms of the loss by name, with their weights. The curve holds the mean of each.
    ``before_step``: called before each step. It may change what the step does, and returns a key for each kind of
    step. Nothing else may change it: on a GPU the steps of one kind are recorded once and replayed.
    ``after_epoch``: called with the number of the epoch, the model and the optimizer, both of which it may change.
    What it returns is added to the curve.
    """

    penalties: Callable[[int], dict[str, Tensor]] = _no_penalties
    before_step: Callable[[], Hashable] = _same_step
    after_epoch: Callable[[int, nn.Module, torch.optim.SGD], dict[str, Any]] = _nothing


PLAIN = Callbacks()


def fit(
    model: nn.Module,
    train: Batches,
    training: Training,
    callbacks: Callbacks = PLAIN,
    state: StateFile | None = None,
) -> list[dict]:
    """Train ``model`` in place and return its curve: one dict per epoch (epoch, loss, accuracy, lr, seconds, …).

    The random numbers of the caller are left alone.

    ``train``: images in memory, which are shuffled and augmented; texts, which are shuffled; or any batches
    ``(inputs, targets)`` with a length, in their order.
    ``state``: file that holds the training after each epoch. If it exists, the training resumes from it. Since the
    random numbers depend on seed and epoch only, it then ends in the same weights as an unbroken one.

    Raises ``FloatingPointError`` where the loss is not finite; the state of the last epoch stays in the file. Raises
    ``UserError`` for a loss without a gradient, and for an embedding with sparse ones. Raises it also where the file is
    truncated, belongs to another training or is in use by another process.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise UserError(f"{name} has sparse gradients, which no recipe takes; set model.{name}.sparse = False")
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    loop = _Loop(model, training, callbacks)
    if state is None:
        return loop.run(train, [])
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    identity = {"shapes": shapes, "data": digest_if_known(train)}
    with state.opened(training.recipe, training.seed, identity) as opened:
        curve = opened.resume(model, loop.optimizer)
        return loop.run(train, curve, lambda: opened.save(model, loop.optimizer, curve))


class _Loop:
    """The epochs of one training."""

    def __init__(self, model: nn.Module, training: Training, callbacks: Callbacks) -> None:
        self.model, self.recipe, self.training, self.callbacks = model, training.recipe, training, callbacks
        if callbacks is not PLAIN and self.recipe.optimizer != "sgd":
            raise UserError(
                f"recipe.optimizer={self.recipe.optimizer}: a method that selects while it trains knows sgd alone"
            )
        self.optimizer = _optimizer(model, self.recipe, training.undecayed)
        self.loss = training.loss
        if self.loss is F.cross_entropy:
            self.loss = partial(_smoothed, label_smoothing=self.recipe.label_smoothing)

    def run(self, train: Batches, curve: list[dict], save: Callable[[], None] = lambda: None) -> list[dict]:
        """Train the epochs that are missing in ``curve``, and append them. ``save`` is called after each."""
        left, epochs = range(len(curve), self.recipe.epochs), self.recipe.epochs
        bar = Bar(left, "train", initial=len(curve), total=epochs, unit="epoch")
        with bar, torch.random.fork_rng(), own_stream(device_of(self.model)):
            for epoch in bar:
                started = time.perf_counter()
                torch.manual_seed(self.training.seed_of(epoch))
                point = {"epoch": epoch, **self._epoch(epoch, train)}
                point["seconds"] = round(time.perf_counter() - started, 2)
                if isinstance(train, ImageSplit):
                    point["side"] = self.recipe.image_size(epoch, train.images.shape[-1])
                point |= self.callbacks.after_epoch(epoch, self.model, cast(torch.optim.SGD, self.optimizer))
                curve.append(point)
                _say(bar, point, epochs)
                bar.tell(point)
                save()
        return curve

    def _epoch(self, epoch: int, train: Batches) -> dict[str, Any]:
        """Train one epoch. Return the mean of each term of the loss, the accuracy and the last learning rate."""
        self.model.train()
        device = device_of(self.model)
        steps, batches = epoch_batches(train, self.recipe, epoch, self.training.seed_of(epoch))
        gradient_step = Replayed(partial(self._gradient_step, epoch), self.model.parameters())
        sums: dict[str, float] = {}
        correct, seen, scored = torch.zeros((), device=device), 0, True
        for step, (inputs, targets) in enumerate(batches):
            count = target_count(targets, inputs)
            inputs, targets = to_device(inputs, device), to_device(targets, device)
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.learning_rate((epoch + step / steps) / self.recipe.epochs)
            names, values, outputs = gradient_step(inputs, targets, self.callbacks.before_step())
            terms = values.tolist()
            if not all(map(math.isfinite, terms)):
                raise FloatingPointError(
                    f"the training loss became {sum(terms)} in epoch {epoch}, step {step}; lower lr"
                )
            self.optimizer.step()
            for name, term in zip(names, terms, strict=True):
                sums[name] = sums.get(name, 0.0) + term * count
            scored = scored and are_scores(outputs, targets)
            if scored:
                correct += (logits_of(outputs).argmax(1) == targets).sum()
            seen += count
        if not seen:
            raise UserError("the train split is empty; give at least one batch of (inputs, targets)")
        means = {name: value / seen for name, value in sums.items()}
        accuracy = correct.item() / seen if scored else None
        return {**means, "accuracy": accuracy, "lr": self.optimizer.param_groups[0]["lr"]}

    def _gradient_step(self, epoch: int, inputs: Inputs, targets: Any) -> tuple[list[str], Tensor, Any]:
        """Set the gradients of one batch. Return names and values of the terms of its loss, and the outputs."""
        self.optimizer.zero_grad(set_to_none=True)
        half = self.recipe.precision == "bfloat16"
        # Without the cache: a recorded step must cast each weight anew, and each is used only once.
        with torch.autocast(device_of(self.model).type, torch.bfloat16, half, cache_enabled=False):
            outputs = forward(self.model, inputs)
        outputs = outputs.float() if isinstance(outputs, Tensor) else outputs
        terms = {"loss": self.loss(outputs, targets), **self.callbacks.penalties(epoch)}
        if not terms["loss"].requires_grad:  # penalties alone may have one
            raise UserError(
                "the training loss has no gradient: all weights are frozen, or the model or the loss detaches its "
                "output or is not differentiable; call model.requires_grad_() before, or give another loss="
            )
        values = torch.stack(list(terms.values()))
        values.sum().backward()
        return list(terms), values.detach(), outputs


def _say(bar: Bar, point: dict[str, Any], epochs: int) -> None:
    said = {key: f"{value:.4f}" for key in ("loss", "accuracy") if (value := point[key]) is not None}
    bar.set_postfix(said)
    if bar.disable:  # no terminal: print one line per epoch
        print(f"epoch {point['epoch'] + 1}/{epochs}: {', '.join(f'{key} {value}' for key, value in said.items())}")


def _smoothed(outputs: Any, targets: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(logits_of(outputs).float(), targets, label_smoothing=label_smoothing)


def _optimizer(model: nn.Module, recipe: Recipe, undecayed: Collection[str]) -> torch.optim.Optimizer:
    decayed = [parameter for name, parameter in model.named_parameters() if name not in undecayed]
    spared = [parameter for name, parameter in model.named_parameters() if name in undecayed]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    given = [group for group in groups if group["params"]]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(given, recipe.lr, (recipe.momentum, 0.999), weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        given, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.momentum > 0
    )
