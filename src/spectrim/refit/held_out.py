"""Divide batches into those that the steps of a refinement read, and those on which it is judged."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from spectrim.batches import Inputs, cloned, sample_count
from spectrim.statistics.objective import Objective

HELD_OUT = 0.2  # part of the calibration batches that no step reads
HELD_OUT_SAMPLES = 1000  # number of calibration samples that are held out where the steps read another split

Batch = tuple[Inputs, Any]


def divided(objective: Objective, split: str, samples: int) -> tuple[list[Batch], list[Batch]]:
    """Return the batches of the steps and those that are held out, in memory. They share none.

    ``split``: the split that the steps read. The calibration batches that are held out are the last ones.
    ``samples``: number of samples in all steps.
    """
    if split != "calibration":
        held: list[Batch] = []
        for batch in objective.batches("calibration"):
            held.append(cloned(batch))
            while sum(map(count_of, held[1:])) >= HELD_OUT_SAMPLES:  # a refit has read the first ones
                del held[0]
        return list(objective.held(split, samples).batches(split)), held
    first = count_of(next(iter(objective.batches("calibration"))))
    wanted = max(math.ceil(samples / (1 - HELD_OUT)), first + 1)  # two batches at least
    batches = list(objective.held("calibration", wanted).batches("calibration"))
    count = max(1, round(HELD_OUT * len(batches)))
    return batches[:-count], batches[-count:]


def count_of(batch: Batch) -> int:
    """Return the number of samples of a batch."""
    inputs, targets = batch
    return sample_count(targets, inputs)


def order_of(counts: Sequence[int], samples: int, seed: int) -> list[int]:
    """Return the batches of all steps by their numbers: again and again in new orders until ``samples`` are read.

    ``counts``: number of samples of each batch.
    """
    generator, order, read = torch.Generator().manual_seed(seed), list[int](), 0
    while read < samples:
        for index in torch.randperm(len(counts), generator=generator).tolist():
            if read < samples:
                order.append(index)
                read += counts[index]
    return order
