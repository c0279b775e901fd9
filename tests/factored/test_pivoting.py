"""Pivots are rows of the product, and give its other rows with small coefficients, whatever the factors are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spectrim.errors import UserError
from spectrim.factored.pivoting import BOUND, pivoted


def product(outputs: int, inputs: int, rank: int, seed: int, spectrum: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    B, A = (torch.randn(shape, generator=generator) for shape in ((outputs, rank), (rank, inputs)))
    steps = torch.arange(rank)
    scale = {"flat": torch.ones(rank), "falling": 10.0 ** (-steps), "repeated": 1.0 + (steps < 2), "low": steps < 1}
    return B * scale[spectrum], A


@given(
    st.integers(2, 12), st.integers(1, 12), st.integers(0, 99), st.sampled_from(["flat", "falling", "repeated", "low"])
)
def test_pivots_and_coefficients_give_all_rows(outputs: int, inputs: int, seed: int, spectrum: str) -> None:
    rank = min(outputs - 1, inputs)
    B, A = product(outputs, inputs, rank, seed, spectrum)
    found, W = pivoted(B, A), B.double() @ A.double()
    assert sorted([*found.pivots.tolist(), *found.others.tolist()]) == list(range(outputs))
    assert float(found.coefficients_MR.abs().max()) <= BOUND + 1e-9
    tolerance = 1e-12 * max(1.0, float(W.abs().max()))
    torch.testing.assert_close(found.pivot_rows_RI, W[found.pivots], atol=tolerance, rtol=0)
    torch.testing.assert_close(found.coefficients_MR @ found.pivot_rows_RI, W[found.others], atol=tolerance, rtol=0)


def growing(size: int) -> Tensor:
    """Return the columns on which elimination with partial pivoting grows most: 1, 2, 4, …"""
    return torch.eye(size) - torch.tril(torch.ones(size, size), -1)


def test_rows_are_exchanged_where_elimination_alone_would_leave_large_coefficients() -> None:
    B = torch.cat([growing(24), -torch.ones(1, 24)])
    found = pivoted(B, torch.eye(24))
    assert float(found.coefficients_MR.abs().max()) <= BOUND + 1e-9
    rest = torch.linalg.solve(B[:24].double(), B[24:].double(), left=False)
    assert float(rest.abs().max()) > 1e3  # of the pivots that elimination takes


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(broken: float) -> None:
    B, A = product(5, 4, 2, 0, "flat")
    B[0, 0] = broken
    with pytest.raises(UserError, match="NaN or infinity"):
        pivoted(B, A)
