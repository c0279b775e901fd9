"""Splits are read as often as wanted, and what is read of them is counted."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from spectrim.errors import UserError
from spectrim.statistics import split_reader
from spectrim.statistics.split_reader import SplitReader


def read(batches: Any) -> SplitReader:
    return SplitReader({"calibration": batches})


def test_an_algorithm_cannot_see_a_split_it_was_not_given(batches: Any) -> None:
    with pytest.raises(UserError, match="^test batches are missing; pass test="):
        read(batches).batches("test")


def test_batches_that_can_be_read_only_once_are_refused(batches: Any) -> None:
    with pytest.raises(UserError, match="calibration split can be read only once"):
        read(batch for batch in batches)


class Within:
    """Batches whose passes are those of ``inner``; with ``held`` they all share one iterator."""

    def __init__(self, inner: Any, held: bool = False) -> None:
        self.inner, self.held = inner, iter(inner) if held else None

    def __iter__(self) -> Iterator[Any]:
        return self.held or iter(self.inner)


@pytest.mark.parametrize("kind", [list, lambda batches: (batch for batch in batches)], ids=["list", "generator"])
def test_a_pass_that_would_go_on_where_the_last_one_has_ended_is_refused(batches: Any, kind: Any) -> None:
    """Else the first batch, which is read as an example, would be missing from all that is computed."""
    reader = read(Within(kind(batches), held=True))
    reader.example("calibration")
    with pytest.raises(UserError, match="^the calibration split can be read only once; give a list or a DataLoader"):
        list(reader.batches("calibration"))


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_inside_of_another_object_are_read_again(workers: int) -> None:
    samples = [(torch.zeros(2), 0)] * 4
    reader = read(Within(DataLoader(samples, 2, num_workers=workers, persistent_workers=workers > 0)))
    reader.example("calibration")
    assert [len(list(reader.batches("calibration"))) for _ in range(2)] == [2, 2]


@pytest.mark.parametrize("batch", ["a text", 3, (1, 2, 3), ()])
def test_a_batch_that_is_no_pair_is_said_in_one_line(batch: Any) -> None:
    with pytest.raises(UserError, match="^a batch of the calibration split is a .*, not a pair: give") as refusal:
        list(read([batch]).counted("calibration"))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("batches", [None, 3])
def test_what_cannot_be_iterated_is_no_set(batches: Any) -> None:
    with pytest.raises(UserError, match="^the calibration split is a .*; give a list of batches or a DataLoader$"):
        read(batches)


@pytest.mark.parametrize("shapes", [[(8, 3), (8, 3)], [(8, 3), (8, 4)], [(8, 3, 4, 4), (8, 3, 6, 6)], [(8, 3), (5,)]])
def test_two_batches_of_inputs_alone_are_no_pair(shapes: Any) -> None:
    batches = [torch.zeros(shape) for shape in shapes]
    assert [tuple(inputs.shape) for inputs, _ in read(batches).counted("calibration")] == shapes


def test_batches_can_be_read_again(batches: Any) -> None:
    pairs = read(batches).batches("calibration")
    assert len(list(pairs)) == len(list(pairs)) == len(batches)


def test_the_samples_of_batches_that_are_counted_add_up(batches: Any) -> None:
    reader = read(batches)
    reader.example("calibration"), list(reader.batches("calibration")), list(reader.until("calibration", 20))
    assert not reader.read
    assert [len(targets) for _, targets in reader.counted("calibration")] == [16, 16, 7]
    assert reader.read == {"calibration": 39}
    assert [len(targets) for _, targets in reader.first("calibration", 17, "few")] == [16, 16]
    next(iter(reader.counted("calibration")))
    assert reader.read == {"calibration": 39 + 32 + 16}


def test_an_empty_split_is_refused_where_samples_are_needed() -> None:
    for call in (read([]).example, lambda split: list(read([]).first(split, 1, "few"))):
        with pytest.raises(UserError, match="^the calibration split is empty; give at least one batch"):
            call("calibration")


X = torch.zeros(2, 3)


@pytest.mark.parametrize("batch", [X, {"x": X}, [X], (X,), (X, None)])
def test_inputs_alone_are_a_batch_without_targets(batch: Any) -> None:
    ((inputs, targets),) = read([batch]).counted("calibration")
    assert targets is None and (inputs["x"] if isinstance(inputs, dict) else inputs) is X


@pytest.mark.parametrize("batches", [X, X.numpy(), {"x": X}, (X, X), (X.numpy(), X.numpy()), "a text", 3, None])
def test_what_is_no_list_of_batches_is_said_in_one_line(batches: Any) -> None:
    with pytest.raises(
        UserError,
        match=r"^the calibration split is .*; give a list of batches|^calibration= is one pair \(inputs, targets\)",
    ) as refusal:
        read(batches)
    assert "\n" not in str(refusal.value)


class Endless:
    """Batches of two samples without a length, and without an end where ``count`` is None."""

    def __init__(self, count: int | None) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        batch = torch.zeros(2, 16), torch.zeros(2, dtype=torch.int64)
        return itertools.repeat(batch) if self.count is None else itertools.repeat(batch, self.count)


def test_batches_without_an_end_are_told_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_reader, "LONGEST", 10)
    for endless in (Endless(None), DataLoader(Stream(), batch_size=2)):
        reader = SplitReader({"calibration": endless})
        assert len(list(reader.until("calibration", 8))) == 4
        with pytest.raises(UserError, match=r"no end after 10 samples; give a part of it") as refusal:
            list(reader.counted("calibration"))
        assert "\n" not in str(refusal.value)
    assert len(list(SplitReader({"calibration": Endless(5)}).counted("calibration"))) == 5
    with_length = [(torch.zeros(2, 16), torch.zeros(2))] * 6
    assert len(list(SplitReader({"calibration": with_length}).counted("calibration"))) == 6


class Stream(IterableDataset):
    """A data set without an end."""

    def __iter__(self) -> Iterator[Any]:
        return itertools.repeat((torch.zeros(16), 0))


def test_batches_made_in_inference_mode_take_part_in_gradients() -> None:
    with torch.inference_mode():
        batches = [(torch.ones(2), {"labels": [torch.ones(2)]})]
    ((inputs, targets),) = read(batches).batches("calibration")
    weight = torch.ones(2, requires_grad=True)
    (weight * inputs * targets["labels"][0]).sum().backward()
    assert weight.grad is not None and weight.grad.equal(torch.ones(2)) and batches[0][0].is_inference()


@pytest.mark.parametrize("batch", [torch.zeros(0, 4), (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))])
def test_a_batch_without_samples_is_refused(batch: Any) -> None:
    """Its mean is NaN, and statistics of BatchNorm would be."""
    reader = read([(torch.ones(2, 4), torch.ones(2)), batch])
    with pytest.raises(UserError, match="^a batch of the calibration split has no samples; leave it out$"):
        list(reader.batches("calibration"))


def test_a_sample_without_objects_is_a_sample() -> None:
    inputs, targets = torch.ones(1, 3, 4, 4), {"boxes": torch.zeros(0, 4)}
    assert list(read([(inputs, targets)]).batches("calibration")) == [(inputs, targets)]
