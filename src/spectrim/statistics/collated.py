"""Batches of a dataset of single samples, put together by a collator, as ``Trainer`` of transformers does."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from spectrim.batches import Batches
from spectrim.default_losses import decoder_inputs_of
from spectrim.errors import UserError
from spectrim.statistics.processes import Distributed

Collator = Callable[[list[Any]], Any]
LABELS = ("labels", "label", "label_ids", "start_positions", "end_positions")


def collated(dataset: Any, collator: Collator, batch_size: int, model: nn.Module) -> DataLoader:
    """Return batches of ``batch_size`` samples in the order of ``dataset``, each made by ``collator``.

    Of a sample that is a mapping, the collator gets what ``forward`` of ``model`` takes by name, and labels. It gets
    the whole sample where ``forward`` takes none of its entries, such as a text that the collator tokenizes.

    Raises ``UserError`` for a batch size below 1, a collator that cannot be called, and batches in place of samples.
    """
    if not callable(collator):
        raise UserError(
            f"collator={collator!r:.40} cannot be called; pass a function from a list of samples to a batch"
        )
    if type(batch_size) is not int or batch_size < 1:
        raise UserError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
    if isinstance(dataset, DataLoader):
        raise UserError("a DataLoader has a collator of its own; pass its dataset, or leave collator= out")
    taken = frozenset(inspect.signature(model.forward).parameters)
    return DataLoader(dataset, batch_size, collate_fn=_Wanted(collator, taken))


@dataclass(frozen=True)
class _Wanted:
    """A collator that sees only the wanted entries of each sample. Worker processes can be given it."""

    collator: Collator
    taken: frozenset[str]

    def __call__(self, samples: Sequence[Any]) -> Any:
        return self.collator([self._of(sample) for sample in samples])

    def _of(self, sample: Any) -> Any:
        if not isinstance(sample, Mapping) or not self.taken & sample.keys():
            return sample
        return {name: value for name, value in sample.items() if name in self.taken or name in LABELS}


def with_decoder_inputs(batches: Batches, model: nn.Module) -> Batches:
    """Return batches that hold ``decoder_input_ids`` wherever they hold ``labels`` for an encoder-decoder.

    Such a model of transformers makes the inputs of its decoder from the labels, shifted to the right. It does not see
    the labels here, since they become the targets. The batches of any other model come back as they are.
    """
    shift = decoder_inputs_of(model)
    if shift is None:
        return batches
    if isinstance(batches, Distributed):
        return Distributed(with_decoder_inputs(batches.batches, model), batches.group)
    return (_SizedShifted if isinstance(batches, Sized) else _Shifted)(batches, shift)


@dataclass(frozen=True, eq=False)
class _Shifted:
    """Batches that are completed as they are read."""

    batches: Any
    shift: Callable[..., Any]

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            given = isinstance(batch, Mapping) and {"decoder_input_ids", "decoder_inputs_embeds"} & batch.keys()
            if not isinstance(batch, Mapping) or "labels" not in batch or given:
                yield batch
            else:
                yield {**batch, "decoder_input_ids": self.shift(labels=batch["labels"])}


class _SizedShifted(_Shifted):
    """Such batches with a length, which training needs."""

    def __len__(self) -> int:
        return len(self.batches)
