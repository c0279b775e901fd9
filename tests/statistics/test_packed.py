"""A moment by its lower triangle is the whole moment again when it is looked up."""

import pytest
import torch

from spectrim.statistics.packed import (
    SMALLEST,
    Packed,
    PackedMoments,
    as_result,
    entries,
    held,
    moment_of,
    nbytes,
    of_result,
)


@pytest.mark.parametrize("side", [SMALLEST - 1, SMALLEST, SMALLEST + 1])
@pytest.mark.parametrize("groups", [1, 3])
def test_what_is_held_makes_the_moment_again(side: int, groups: int) -> None:
    x = torch.randn(groups, 40, side)
    moment = x.mT @ x
    moment = moment.tril() + moment.tril(-1).mT  # symmetric to the last bit, whatever the library
    found = moment_of(held(moment), side)
    assert isinstance(found, Packed) == (side >= SMALLEST)
    assert PackedMoments({"view": found})["view"].equal(moment)


def test_a_held_triangle_takes_half_of_the_memory() -> None:
    moment = torch.eye(400).unsqueeze(0)
    assert held(moment).numel() == entries(400) == 400 * 401 // 2


@pytest.mark.parametrize("side", [SMALLEST - 1, SMALLEST])
def test_moments_that_layers_hold_together_count_once(side: int) -> None:
    values, other = held(torch.eye(side).unsqueeze(0)), torch.ones(3)
    q, k = (PackedMoments({"linear": moment_of(values, side), "outputs linear": other.clone()}) for _ in range(2))
    assert nbytes([q, k]) == 4 * (entries(side) + 2 * 3)


def test_unpacked_moments_are_a_mapping() -> None:
    moments = PackedMoments({"view": moment_of(held(torch.eye(300).unsqueeze(0)), 300), "head": torch.ones(2)})
    assert list(moments) == ["view", "head"] and len(moments) == 2 and "view" in moments and "other" not in moments
    assert moments.get("other") is None and dict(moments)["view"].equal(torch.eye(300).unsqueeze(0))


def test_moments_come_back_from_what_a_folder_keeps_of_them() -> None:
    shared = moment_of(held(torch.eye(300).unsqueeze(0)), 300)
    q, k = PackedMoments({"linear": shared}), PackedMoments({"linear": shared, "head": torch.ones(2)})
    result = as_result({"q": q, "k": k, "none": PackedMoments({})})
    assert len(result.tensors) == 2  # the shared one once
    found = of_result(result)
    assert list(found) == ["q", "k", "none"] and nbytes(found.values()) == nbytes([q, k])
    for name, own in (("q", q), ("k", k)):
        assert list(found[name]) == list(own) and all(found[name][view].equal(own[view]) for view in own)
