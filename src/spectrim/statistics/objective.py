"""The loss on named splits: its value and its gradient."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from spectrim.batches import (
    Batches,
    Inputs,
    Pairs,
    alone_trainable,
    device_of,
    evaluating,
    forward,
    sample_count,
    to_device,
)
from spectrim.decomposers.spectrum import content
from spectrim.errors import UserError
from spectrim.losses import Loss, TokenLoss, answered_rightly, loss_of
from spectrim.tools.memo import Memory


class Evaluation(NamedTuple):
    """Mean loss a sample, accuracy in [0, 1] (None where the outputs are no scores), number of samples.

    For ``TokenLoss`` the mean is over the tokens to be predicted, and ``n`` is their number: perplexity is exp(loss).
    """

    loss: float
    accuracy: float | None
    n: int


class Objective:
    """A loss, ``loss(model_output, targets)`` with the mean over its batch, on named splits.

    ``F.cross_entropy`` is given the logits of an output that holds them by name, as those of transformers do.

    A split is anything that can be iterated again and again as batches (inputs, targets). Selectors are handed an
    objective that holds ``calibration`` and, where they may use it, ``train``; never the test split.

    ``layers_at_once``: of how many layers gradients, and second moments of inputs, are taken at a time, for a model
    where those of all do not fit into memory beside it; their decompositions are laid aside on the disk. None: of all,
    in memory. The numbers are the same. The cost, over the split for each such block of layers: of weights and of
    gates a forward and a backward pass, of inputs a forward pass.
    ``read``: how many samples of each split its methods have passed through a model so far, each as often as it was
    read: what a selector costs, whatever the machine.
    ``memory``: what is kept from one selection to the next. Where none is given the gradients alone; whitened spectra
    and the gates of joint selection (kinds ``whitened`` and ``gates``) are of use to several selections only, and take
    room.

    Raises ``UserError`` for a generator, which can be read only once, and for what cannot be iterated at all.
    """

    def __init__(
        self,
        loss: Loss,
        splits: Mapping[str, Batches],
        layers_at_once: int | None = None,
        memory: Memory | None = None,
    ) -> None:
        self.loss, self.splits, self.layers_at_once = loss, dict(splits), layers_at_once
        self.memory = memory or Memory(whitened=0, gates=0)
        self.read = Counter[str]()
        if layers_at_once is not None and (type(layers_at_once) is not int or layers_at_once < 1):
            raise UserError(f"layers_at_once must be a whole number of at least 1, or None; got {layers_at_once!r}")
        for name, batches in self.splits.items():
            if not isinstance(batches, Iterable):
                raise UserError(f"the {name} set is a {type(batches).__name__}; give a list of batches or a DataLoader")
            if isinstance(batches, Iterator):
                raise UserError(f"the {name} set can be read only once; give a list or a DataLoader, not a generator")

    def example(self) -> Inputs:
        """The inputs of the first calibration batch."""
        for inputs, _ in self.batches("calibration"):
            return inputs
        raise UserError("the calibration set is empty; give at least one batch of (inputs, targets)")

    def evaluate(self, model: nn.Module, split: str = "calibration") -> Evaluation:
        """Loss and accuracy of ``model`` in eval mode. Raises ``UserError`` where the loss is not finite."""
        device, total, correct, seen = device_of(model), 0.0, 0, 0
        scored = True
        with evaluating(model), torch.inference_mode():
            for inputs, targets in self.batches(split):
                outputs, targets = forward(model, to_device(inputs, device)), to_device(targets, device)
                count = self.weight(targets, inputs)
                total += self.finite_loss(outputs, targets, split).item() * count
                seen += count
                self.read[split] += sample_count(targets, inputs)
                right = answered_rightly(self.loss, outputs, targets)
                scored = scored and right is not None
                correct += right or 0
        self.require(seen, split)
        return Evaluation(total / seen, correct / seen if scored else None, seen)

    def loss_within(self, model: nn.Module, split: str, limit: float, n: int) -> float | None:
        """The mean loss over ``split``, of ``n`` as ``evaluate`` counts, or None once certain to exceed ``limit``.

        A partial sum above ``limit * n`` decides where losses are not negative; with a negative limit all are summed.
        """
        device, total = device_of(model), 0.0
        with evaluating(model), torch.inference_mode():
            for inputs, targets in self.batches(split):
                targets = to_device(targets, device)
                loss = loss_of(self.loss, forward(model, to_device(inputs, device)), targets)
                total += loss.item() * self.weight(targets, inputs)
                self.read[split] += sample_count(targets, inputs)
                if limit >= 0 and not total <= limit * n:  # also where the loss is not a number
                    return None
        return total / n if total <= limit * n else None

    def gradients(self, model: nn.Module, layers: Sequence[str], split: str = "calibration") -> dict[str, Tensor]:
        """Gradient of the mean loss by the weight of each layer, model in eval mode; nothing is left in ``.grad``.

        Remembered for as long as no parameter or buffer of the model changes, so that a sweep takes one pass.
        """
        weights = {name: model.get_submodule(name).weight for name in layers}
        return self.memory.get(
            model,
            "gradients",
            lambda: (split, tuple(layers), content(model.state_dict().values())),
            lambda: self._gradient_pass(model, weights, split),  # type: ignore[arg-type]
        )

    def each_gradient(
        self, model: nn.Module, layers: Sequence[str], split: str = "calibration"
    ) -> Iterator[tuple[str, Tensor]]:
        """The ``gradients`` layer by layer.

        With ``layers_at_once`` none are remembered, and memory holds two blocks of them: the sum and that of a batch.
        """
        if self.layers_at_once is None:
            yield from self.gradients(model, layers, split).items()
            return
        for block in self.blocks(layers):
            weights = {name: model.get_submodule(name).weight for name in block}
            yield from self._gradient_pass(model, weights, split).items()  # type: ignore[arg-type]

    def blocks(self, layers: Sequence[str]) -> list[Sequence[str]]:
        """``layers`` in blocks of ``layers_at_once``."""
        size = self.layers_at_once or max(1, len(layers))
        return [layers[start : start + size] for start in range(0, len(layers), size)]

    def _gradient_pass(self, model: nn.Module, weights: dict[str, Tensor], split: str) -> dict[str, Tensor]:
        device, seen = device_of(model), 0
        sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        with evaluating(model), torch.enable_grad(), alone_trainable(model, weights.values()):
            for inputs, targets in self.batches(split):
                targets = to_device(targets, device)
                loss = self.finite_loss(forward(model, to_device(inputs, device)), targets, split)
                count = self.weight(targets, inputs)
                for name, gradient in _by_weight(loss, weights).items():
                    sums[name].add_(gradient, alpha=count)
                seen += count
                self.read[split] += sample_count(targets, inputs)
        self.require(seen, split)
        return {name: total.div_(seen) for name, total in sums.items()}

    def weight(self, targets: Any, inputs: Inputs = None) -> int:
        """What the mean loss of a batch counts for in that of a split: its samples, or its tokens to be predicted."""
        return self.loss.count(targets) if isinstance(self.loss, TokenLoss) else sample_count(targets, inputs)

    def finite_loss(self, outputs: Any, targets: Any, split: str) -> Tensor:
        """The mean loss of one batch. Raises ``UserError`` where it fails on these targets or is not finite."""
        return _finite(loss_of(self.loss, outputs, targets), split)

    def require(self, seen: int, split: str) -> None:
        """Raise ``UserError`` where nothing was seen of ``split``."""
        if not seen:
            raise UserError(f"the {split} set is empty; give at least one batch of (inputs, targets)")

    def first(self, split: str, samples: int, label: str) -> Iterator[tuple[Inputs, Any]]:
        """Whole batches of ``split`` until ``samples`` are reached, under a progress bar called ``label``.

        Raises ``UserError`` for an empty split.
        """
        with tqdm(desc=label, unit="sample", total=samples, leave=False, disable=None) as bar:
            for inputs, targets in self._until(split, samples):
                yield inputs, targets
                self.read[split] += sample_count(targets, inputs)
                bar.update(sample_count(targets, inputs))

    def held(self, split: str, samples: int) -> "Objective":
        """The same loss on the first batches of ``split``, held in memory until ``samples`` are reached.

        For what goes through them several times and must see the same ones: a loader may shuffle.
        """
        kept = list(self._until(split, samples))
        same = Objective(self.loss, {split: kept}, self.layers_at_once, self.memory)
        same.read = self.read
        return same

    def _until(self, split: str, samples: int) -> Iterator[tuple[Inputs, Any]]:
        seen = 0
        for inputs, targets in self.batches(split):
            yield inputs, targets
            seen += sample_count(targets, inputs)
            if seen >= samples:
                break
        self.require(seen, split)

    def batches(self, split: str) -> Batches:
        """The batches of ``split``. Raises ``UserError`` where there is no such split or, once read, no pair."""
        return Pairs(split, self.given(split))

    def given(self, split: str) -> Batches:
        """The split itself, for what does more than read its batches. Raises ``UserError`` where there is none."""
        if split not in self.splits:
            raise UserError(f"there is no split {split!r} here; known are {', '.join(sorted(self.splits))}")
        return self.splits[split]


def _by_weight(loss: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradient of the loss of one batch by each weight, or one line on why there is none."""
    if not loss.requires_grad:
        raise UserError("the loss has no gradient: the model or the loss detaches its output, or is not differentiable")
    found = dict(zip(weights, torch.autograd.grad(loss, list(weights.values()), allow_unused=True), strict=True))
    for name, gradient in found.items():
        if gradient is None:
            raise UserError(
                f"layer {name} takes no part in the loss of some batch: let the model use it on every batch, or make "
                "one that does not use it the first of the calibration set, and it stays dense"
            )
    return found


def _finite(loss: Tensor, split: str) -> Tensor:
    if not torch.isfinite(loss):
        raise UserError(f"the loss on the {split} split is {loss.item()}; check the model's weights and the inputs")
    return loss
