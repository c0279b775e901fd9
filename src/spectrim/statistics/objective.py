"""The objective of a selection: a loss on named splits."""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn

from spectrim.batches import Batches, Inputs, cloned, sample_count
from spectrim.errors import UserError
from spectrim.losses import Loss
from spectrim.statistics.evaluation import Evaluation, evaluate, loss_within
from spectrim.statistics.gradients import mean_gradients
from spectrim.statistics.processes import Distributed, Processes
from spectrim.statistics.remembered import MEASUREMENTS, Remembered
from spectrim.statistics.split_reader import Batch, SplitReader
from spectrim.surgery.layer_choice import EVERY_LAYER, LayerChoice
from spectrim.tools import resume
from spectrim.tools.content import content, of_function, of_model, of_state
from spectrim.tools.memo import Memory
from spectrim.tools.resume import Result, ResumeFolder

T = TypeVar("T")


class NoGradient(UserError):
    """The loss depends on none of the layers that were asked for."""

    def __init__(self) -> None:
        super().__init__(
            "the loss has no gradient: the model or the loss switches gradients off, detaches its output or is not "
            "differentiable; give another loss=, or take an algorithm that needs no gradient, such as knapsack"
        )


class Objective:
    """A loss on named splits, as a selector receives it.

    It joins ``SplitReader``, which reads the splits, with the functions that measure a model on them (``evaluation``,
    ``gradients``) and with ``Remembered``, which keeps results between selections. Selectors receive ``calibration``
    and, if they may use them, ``verification`` and ``train``, but never the test split.

    ``loss``: ``loss(model_output, targets)``, the mean over a batch. ``F.cross_entropy`` receives the logits of an
    output that holds them by name, as models of transformers return.
    ``splits``: name → batches ``(inputs, targets)`` that can be iterated repeatedly.
    ``layers_at_once``: number of layers whose gradients and input moments are held in memory at once; their
    decompositions are spilled to disk. None: all layers, in memory. The numbers are the same. Each block of layers
    takes its own passes over the split.
    ``memory``: cache of results. By default it keeps gradients and single measurements. Whitened spectra and the gates
    of joint selection (kinds ``whitened`` and ``gates``) take room and only serve several selections.
    ``read``: counter of the samples that passed through a model, by split; a new one by default. It measures the cost
    of a selector on any machine.
    ``choice``: which layers the user wants to be factored, and the ranks that the user has set.

    Raises ``UserError`` for a split that is a generator or is not iterable.
    """

    def __init__(
        self,
        loss: Loss,
        splits: Mapping[str, Batches],
        layers_at_once: int | None = None,
        memory: Memory | None = None,
        read: Counter[str] | None = None,
        choice: LayerChoice = EVERY_LAYER,
    ) -> None:
        if layers_at_once is not None and (type(layers_at_once) is not int or layers_at_once < 1):
            raise UserError(f"layers_at_once must be a whole number of at least 1, or None; got {layers_at_once!r}")
        self.loss, self.layers_at_once, self.choice = loss, layers_at_once, choice
        self._reader = SplitReader(splits, read)
        self._remembered = Remembered(memory or Memory(whitened=0, gates=0, **MEASUREMENTS), self.read)

    @property
    def splits(self) -> dict[str, Batches]:
        """The splits by name."""
        return self._reader.splits

    @property
    def read(self) -> Counter[str]:
        """Number of samples that passed through a model, by split, each as often as it was read."""
        return self._reader.read

    def on(self, splits: Mapping[str, Batches]) -> "Objective":
        """Return the same loss on other batches; the samples read are counted together."""
        return Objective(self.loss, splits, self.layers_at_once, read=self.read, choice=self.choice)

    def leaving(self, reasons: Mapping[str, str]) -> "Objective":
        """Return this objective with layers that stay dense, by name, and why. Both share all that is remembered."""
        own = copy(self)
        own.choice = replace(self.choice, left=tuple(reasons.items()))
        return own

    def start_selection(self) -> None:
        """Set ``read`` to zero. From here on it counts as if nothing were remembered from earlier selections."""
        self._remembered.start_selection()

    def remembered(self, model: nn.Module, kind: str, key: Callable[[], Hashable], make: Callable[[], T]) -> T:
        """Return the result for ``key()`` from memory, or call ``make`` and remember its result."""
        return self._remembered.get(model, kind, key, make)

    def given(self, split: str) -> Batches:
        """Return the split as it was given. Raises ``UserError`` where there is none of this name."""
        return self._reader.given(split)

    def processes(self, split: str) -> Processes:
        """Return the processes that share the split, or this one alone."""
        return self._reader.processes(split)

    def require_same(self, what: str, text: Callable[[], str]) -> None:
        """Raise ``UserError`` where the processes that share a split differ in ``text()``, which describes ``what``."""
        for split in self.splits:
            if self.processes(split).size > 1:
                self.processes(split).require_same(text(), what)

    def batches(self, split: str) -> Batches:
        """Return the batches without counting them. Iteration raises ``UserError`` for a batch that is not a pair."""
        return self._reader.batches(split)

    def counted(self, split: str) -> Iterator[Batch]:
        """Yield the batches and count their samples as read."""
        return self._reader.counted(split)

    def first(self, split: str, samples: int, label: str) -> Iterator[Batch]:
        """Yield and count whole batches until ``samples`` are reached, with a progress bar called ``label``."""
        return self._reader.first(split, samples, label)

    def held(self, split: str, samples: int) -> "Objective":
        """Return the same loss on the first batches of ``split``, held in memory until ``samples`` are reached.

        Several passes then see the same samples, even if the loader shuffles, or uses the memory of a batch again.
        """
        batches: Batches = [cloned(batch) for batch in self._reader.until(split, samples)]
        given = self.given(split)
        return self.on({split: Distributed(batches, given.group) if isinstance(given, Distributed) else batches})

    def example(self) -> Inputs | None:
        """Return the inputs of the first calibration batch; None where there is no calibration split."""
        return self._reader.example("calibration")

    def evaluate(self, model: nn.Module, split: str = "calibration") -> Evaluation:
        """Return loss and accuracy of ``model`` (``evaluation.evaluate``)."""
        return evaluate(model, self.loss, self.counted(split), split, self.processes(split))

    def loss_within(self, model: nn.Module, split: str, limit: float, n: int) -> float | None:
        """Return the loss of ``model``, or None if it exceeds ``limit`` (``evaluation.loss_within``)."""
        return loss_within(model, self.loss, self.counted(split), limit, n, self.processes(split))

    def gradients(self, model: nn.Module, layers: Sequence[str], split: str = "calibration") -> dict[str, Tensor]:
        """Return the gradient of the mean loss by the weight of each layer (``gradients.mean_gradients``).

        A layer that the loss does not depend on is left out. The result is remembered until a parameter or buffer of
        the model changes, so a sweep takes one pass. Raises ``NoGradient`` where the loss depends on no layer.
        """
        found = self.remembered(
            model,
            "gradients",
            lambda: (split, tuple(layers), of_state(model)),
            lambda: self._mean_gradients(model, layers, split),
        )
        if not found:
            raise NoGradient
        return found

    def each_gradient(
        self, model: nn.Module, layers: Sequence[str], split: str = "calibration"
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the ``gradients`` layer by layer.

        With ``layers_at_once`` none are remembered. Memory then holds two blocks of them: the sum and one batch's.
        Raises ``NoGradient`` as ``gradients`` does.
        """
        if self.layers_at_once is None:
            yield from self.gradients(model, layers, split).items()
            return
        any_found = False
        for block in self.blocks(layers):
            for item in self._mean_gradients(model, block, split).items():
                any_found = True
                yield item
        if not any_found:
            raise NoGradient

    def blocks(self, layers: Sequence[str]) -> list[Sequence[str]]:
        """Return ``layers`` in blocks of ``layers_at_once``."""
        size = self.layers_at_once or max(1, len(layers))
        return [layers[start : start + size] for start in range(0, len(layers), size)]

    def _mean_gradients(self, model: nn.Module, layers: Sequence[str], split: str) -> dict[str, Tensor]:
        weights: Any = {name: model.get_submodule(name).weight for name in layers}

        def made() -> dict[str, Tensor]:
            return mean_gradients(model, weights, self.loss, self.counted(split), split, self.processes(split))

        folder = resume.current()
        if folder is None:
            return made()
        found = self.resumed(folder, "gradients", model, split, lambda: resume.Result(made()), list(layers))
        return {name: found.tensors[name].to(weights[name].device) for name in layers if name in found.tensors}

    def resumed(
        self,
        folder: ResumeFolder,
        kind: str,
        model: nn.Module,
        split: str,
        make: Callable[[], Result],
        key: Sequence[Any],
        samples: float = math.inf,
    ) -> Result:
        """Return what ``make`` computes of ``model`` on a split, or what ``folder`` keeps of an earlier process.

        Batches that come in another order, or changed at random, are others, so that nothing is taken up.

        ``key``: settings of the computation.
        ``samples``: number of samples that it reads, in whole batches.
        """
        if self.processes(split).size > 1:  # One process may have finished what another one must take part in.
            return make()
        before, read, seen = Counter(self.read), list[str](), 0
        for inputs, targets in self._reader.until(split, samples):
            read.append(content([inputs, targets]))
            seen += sample_count(targets, inputs)
        depends = [kind, *key, split, read, of_function(self.loss), of_model(model)]
        found = folder.result(kind, lambda: depends, make)
        self.read.clear()
        self.read.update(before + Counter({split: seen}))  # as if it had been computed here
        return found
