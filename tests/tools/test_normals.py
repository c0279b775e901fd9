"""Pieces of a random vector are those of the whole one, and leave the generator where it leaves it."""

import pytest
import torch

from spectrim.tools.normals import Normals


@pytest.mark.parametrize("count", [1, 15, 16, 17, 40, 1000, 3 * 50257])
@pytest.mark.parametrize("piece", [1, 5, 16, 33, 50257])
def test_pieces_are_those_of_the_whole(count: int, piece: int) -> None:
    one, other = (torch.Generator().manual_seed(3) for _ in range(2))
    whole, normals = torch.randn(count, generator=one), Normals(count, other)
    sizes = [min(piece, count - start) for start in range(0, count, piece)][:2000]
    taken = torch.cat([normals.take(size) for size in sizes])
    assert taken.equal(whole[: len(taken)])
    if len(taken) == count:
        assert one.get_state().equal(other.get_state())
