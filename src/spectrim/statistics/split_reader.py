"""Read the batches of named splits."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from spectrim.batches import Batches, Inputs, batch_size, pairs, sample_count
from spectrim.errors import MissingInput, UserError
from spectrim.statistics.processes import Distributed, Processes
from spectrim.tools.live import Bar

Batch = tuple[Inputs, Any]
# What a user has to pass for each split that a selector may read.
KINDS = {
    "calibration": "batches of (inputs, targets), or of inputs alone where no loss is measured",
    "verification": "batches of (inputs, targets) that calibration= does not hold",
    "train": "batches of (inputs, targets) with a length",
}
LONGEST = 20_000  # samples in a pass over batches without a length, which may have no end


@dataclass(eq=False)
class _Pairs:
    """Batches of a split that can be iterated repeatedly; each iteration validates every batch.

    ``last``: returns the iterator of the last pass, or None where nobody holds it any more.
    """

    split: str
    batches: Batches
    last: Callable[[], object] = field(default_factory=lambda: lambda: None, init=False)

    def __iter__(self) -> Iterator[tuple[Inputs, Any]]:
        seen, may_be_endless = 0, not _has_length(self.batches)
        for inputs, targets in pairs(self._begun(), self.split):
            if _is_one_sample(inputs, targets):
                raise UserError(
                    f"the {self.split} split holds single samples, and wants batches; give a DataLoader, or "
                    "collator=torch.utils.data.default_collate"
                )
            if not batch_size(inputs) and not sample_count(targets, inputs):  # its means would be NaN
                raise UserError(f"a batch of the {self.split} split has no samples; leave it out")
            seen += sample_count(targets, inputs) if may_be_endless else 0
            if seen > LONGEST:
                raise UserError(
                    f"the {self.split} split has no length, and no end after {LONGEST:,} samples; give a part of it, "
                    f"such as list(itertools.islice({self.split}, 100))"
                )
            yield inputs, targets

    def _begun(self) -> Iterator[Any]:
        """Return a new pass. Raises ``UserError`` where it would go on where the last one has ended."""
        begun = iter(self.batches)
        # That of torch begins anew, also where the loader keeps it, as it does with persistent workers.
        if begun is self.last() and not type(begun).__module__.startswith("torch.utils.data"):
            raise UserError(f"{_once(self.split)}, not an object that returns the same iterator at each pass")
        try:
            self.last = weakref.ref(begun)
        except TypeError:  # as of a list
            self.last = lambda: begun
        return begun


def _once(split: str) -> str:
    return f"the {split} split can be read only once; give a list or a DataLoader"


def _has_length(batches: Batches) -> bool:
    try:
        len(batches)  # type: ignore[arg-type]
    except TypeError:  # as of a DataLoader over an IterableDataset
        return False
    return True


def _is_one_sample(inputs: Inputs, targets: Any) -> bool:
    """Return whether a batch is a vector with a label. Of an image with a label, only the model can tell."""
    return isinstance(inputs, Tensor) and isinstance(targets, Tensor) and (inputs.ndim, targets.ndim) == (1, 0)


def _is_one_batch(batches: object) -> bool:
    """Return whether these are inputs and targets themselves: a tuple with an array, or a list of two that differ.

    Two batches of inputs alone have as many dimensions, and both hold whole numbers or none does.
    """
    if not isinstance(batches, tuple | list) or not any(isinstance(part, Tensor | np.ndarray) for part in batches):
        return False
    if isinstance(batches, tuple):
        return True
    if len(batches) != 2 or not all(isinstance(part, Tensor | np.ndarray) and part.ndim for part in batches):
        return False
    first, second = batches
    column = first.ndim == second.ndim == 2 and second.shape[1] == 1 < first.shape[1]
    differ = first.ndim != second.ndim or ("float" in str(first.dtype)) != ("float" in str(second.dtype))
    return len(first) == len(second) and (differ or column)


class SplitReader:
    """Named splits that can be read repeatedly, and the number of samples that were read of each.

    ``splits``: name → batches ``(inputs, targets)``.
    ``read``: counter to add to, by name of the split; a new one by default.

    Raises ``UserError`` for a generator, which can be read only once, for a single batch, and for an object that is not
    iterable.
    """

    def __init__(self, splits: Mapping[str, Batches], read: Counter[str] | None = None) -> None:
        self.splits = dict(splits)
        self._pairs = {name: _Pairs(name, batches) for name, batches in self.splits.items()}
        self.read = Counter[str]() if read is None else read
        for name, batches in self.splits.items():
            if isinstance(batches, Distributed):
                batches = batches.batches
            if not isinstance(batches, Iterable) or isinstance(batches, Tensor | np.ndarray | Mapping | str):
                raise UserError(
                    f"the {name} split is a {type(batches).__name__}; give a list of batches or a DataLoader"
                )
            if _is_one_batch(batches):
                raise UserError(
                    f"{name}= is one pair (inputs, targets), and wants an iterable of such batches; give "
                    f"{name}=[(inputs, targets)]"
                )
            if isinstance(batches, Iterator):
                raise UserError(f"{_once(name)}, not a generator")

    def given(self, split: str) -> Batches:
        """Return the split as it was given. Raises ``MissingInput`` where there is none of this name."""
        if split not in self.splits:
            raise MissingInput(f"{split} batches are missing; pass {split}=, {KINDS.get(split, 'batches')}")
        return self.splits[split]

    def processes(self, split: str) -> Processes:
        """Return the processes that share the split."""
        return Processes.that_share(self.splits.get(split))

    def example(self, split: str) -> Inputs | None:
        """Return the inputs of the first batch, which is not counted; None where the split is not given.

        Raises ``UserError`` for an empty split.
        """
        if split not in self.splits:
            return None
        for inputs, _ in self.batches(split):
            return inputs
        raise _empty(split)

    def batches(self, split: str) -> Batches:
        """Return the batches without counting them. Iteration raises ``UserError`` for a batch that is not a pair."""
        self.given(split)
        return self._pairs[split]

    def counted(self, split: str) -> Iterator[Batch]:
        """Yield the batches and count their samples."""
        for inputs, targets in self.batches(split):
            self.read[split] += sample_count(targets, inputs)
            yield inputs, targets

    def first(self, split: str, samples: int, label: str) -> Iterator[Batch]:
        """Yield and count whole batches until ``samples`` are reached, with a progress bar called ``label``.

        Raises ``UserError`` for an empty split.
        """
        with Bar(desc=label, unit="sample", total=samples, leave=False) as bar:
            for inputs, targets in self.until(split, samples):
                self.read[split] += sample_count(targets, inputs)
                yield inputs, targets
                bar.update(sample_count(targets, inputs))

    def until(self, split: str, samples: float) -> Iterator[Batch]:
        """Yield whole batches until ``samples`` are reached, without counting them.

        Processes that share the split read equal parts of ``samples``.

        Raises ``UserError`` for an empty split.
        """
        seen, samples = 0, self.processes(split).share(samples)
        for inputs, targets in self.batches(split):
            yield inputs, targets
            seen += sample_count(targets, inputs)
            if seen >= samples:
                break
        require_samples(seen, split)


def require_samples(seen: int, split: str) -> None:
    """Raise ``UserError`` where a split had no samples."""
    if not seen:
        raise _empty(split)


def _empty(split: str) -> UserError:
    return UserError(
        f"the {split} split is empty; give at least one batch of (inputs, targets), in a list or in a loader that "
        "begins anew at each pass"
    )
