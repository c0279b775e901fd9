"""Splits are read as often as wanted, and what is read of them is counted."""

from typing import Any

import pytest
import torch

from spectrim.errors import UserError
from spectrim.statistics.split_reader import SplitReader


def read(batches: Any) -> SplitReader:
    return SplitReader({"calibration": batches})


def test_a_selector_cannot_see_a_split_it_was_not_given(batches: Any) -> None:
    with pytest.raises(UserError, match="^test batches are missing; pass test="):
        read(batches).batches("test")


def test_batches_that_can_be_read_only_once_are_refused(batches: Any) -> None:
    with pytest.raises(UserError, match="calibration set can be read only once"):
        read(batch for batch in batches)


@pytest.mark.parametrize("batch", ["a text", 3, (1, 2, 3), ()])
def test_a_batch_that_is_no_pair_is_said_in_one_line(batch: Any) -> None:
    with pytest.raises(UserError, match="^a batch of the calibration set is a .*, not a pair: give") as refusal:
        list(read([batch]).counted("calibration"))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("batches", [None, 3])
def test_what_cannot_be_iterated_is_no_set(batches: Any) -> None:
    with pytest.raises(UserError, match="^the calibration set is a .*; give a list of batches or a DataLoader$"):
        read(batches)


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
        with pytest.raises(UserError, match="^the calibration set is empty; give at least one batch"):
            call("calibration")


X = torch.zeros(2, 3)


@pytest.mark.parametrize("batch", [X, {"x": X}, [X], (X,), (X, None)])
def test_inputs_alone_are_a_batch_without_targets(batch: Any) -> None:
    ((inputs, targets),) = read([batch]).counted("calibration")
    assert targets is None and (inputs["x"] if isinstance(inputs, dict) else inputs) is X


@pytest.mark.parametrize("batches", [X, {"x": X}, (X, X), "a text", 3, None])
def test_what_is_no_list_of_batches_is_said_in_one_line(batches: Any) -> None:
    with pytest.raises(UserError, match="^the calibration set is .*; give a list of batches") as refusal:
        read(batches)
    assert "\n" not in str(refusal.value)
