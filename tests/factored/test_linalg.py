"""One decomposition gives every rank: each curve equals what is computed directly at each rank."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectrim.errors import UserError
from spectrim.factored import linalg

sides = st.integers(1, 9)
shapes = st.tuples(st.integers(1, 3), sides, sides)
seeds = st.integers(0, 2**31)
many = settings(max_examples=40, deadline=None)


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def truncation_error(S_R: Tensor) -> Tensor:
    return linalg.tail_sums(S_R.square()).sqrt()


def truncated(factors: linalg.SVD, k: int) -> Tensor:
    U, S, Vh = factors
    return U[..., :k] * S[..., None, :k] @ Vh[..., :k, :]


@many
@given(shapes, seeds)
def test_svd_is_orthonormal_falling_and_whole(shape: tuple[int, ...], seed: int) -> None:
    W = drawn(shape, seed)
    U, S, Vh = factors = linalg.svd(W)
    identity = torch.eye(S.shape[-1], dtype=W.dtype).expand(shape[0], -1, -1)
    torch.testing.assert_close(truncated(factors, S.shape[-1]), W)
    torch.testing.assert_close(U.mT @ U, identity)
    torch.testing.assert_close(Vh @ Vh.mT, identity)
    assert (S.diff(dim=-1) <= 0).all() and (S >= 0).all()


@many
@given(shapes, seeds)
def test_error_is_the_tail_energy_at_every_rank(shape: tuple[int, ...], seed: int) -> None:
    W = drawn(shape, seed)
    factors = linalg.svd(W)
    curve = truncation_error(factors.S_R)
    direct = [torch.linalg.matrix_norm(truncated(factors, k) - W) for k in range(min(shape[1:]) + 1)]
    torch.testing.assert_close(curve, torch.stack(direct, -1), atol=1e-12, rtol=1e-10)


@many
@given(sides, sides, seeds, st.data())
def test_no_other_matrix_of_the_rank_is_nearer(outputs: int, inputs: int, seed: int, data: st.DataObject) -> None:
    W = drawn((outputs, inputs), seed)
    k = data.draw(st.integers(1, min(outputs, inputs)))
    basis = torch.linalg.qr(drawn((outputs, k), seed + 1)).Q
    best_in_basis = basis @ basis.T @ W
    assert truncation_error(linalg.svd(W).S_R)[k] <= torch.linalg.matrix_norm(best_in_basis - W) + 1e-12


@many
@given(shapes, seeds)
def test_first_order_change_is_the_inner_product_at_every_rank(shape: tuple[int, ...], seed: int) -> None:
    W, G = drawn(shape, seed), drawn(shape, seed + 1)
    factors = linalg.svd(W)
    direct = [(G * (truncated(factors, k) - W)).sum((-2, -1)) for k in range(min(shape[1:]) + 1)]
    torch.testing.assert_close(linalg.first_order_change(factors, G), torch.stack(direct, -1), atol=1e-12, rtol=1e-10)


@many
@given(shapes, seeds)
def test_largest_entry_is_the_maximum_at_every_rank(shape: tuple[int, ...], seed: int) -> None:
    W = drawn(shape, seed)
    factors = linalg.svd(W)
    direct = [(truncated(factors, k) - W).abs().max() for k in range(min(shape[1:]) + 1)]
    torch.testing.assert_close(linalg.largest_entry_of_error(factors), torch.stack(direct), atol=1e-12, rtol=1e-10)


def test_gate_gradient_is_the_derivative_by_a_gate() -> None:
    W, x = drawn((4, 6), 0), drawn((5, 6), 1)
    factors = linalg.svd(W)
    gates = torch.ones(4, dtype=W.dtype, requires_grad=True)
    gated = factors.U_OR * (factors.S_R * gates) @ factors.Vh_RI
    (by_gate,) = torch.autograd.grad((x @ gated.T).pow(3).sum(), gates)
    weight = W.clone().requires_grad_()
    (G,) = torch.autograd.grad((x @ weight.T).pow(3).sum(), weight)
    torch.testing.assert_close(linalg.gate_gradient(factors, G), by_gate)


def test_tail_sums_of_known_numbers() -> None:
    assert linalg.tail_sums(torch.tensor([5.0, 3.0, 1.0])).tolist() == [9, 4, 1, 0]


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (3, 4, 6), (2, 3, 5, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_divide_and_conquer_fails_qr_iteration_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    W = drawn(shape, 0).to(dtype)
    usual = linalg.svd(W)

    def does_not_converge(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "svd", does_not_converge)
    fallback = linalg.svd(W)
    assert [part.shape for part in fallback] == [part.shape for part in usual]
    assert {part.dtype for part in fallback} == {dtype}
    torch.testing.assert_close(fallback.S_R, usual.S_R)
    torch.testing.assert_close(truncated(fallback, 2), truncated(usual, 2))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    W = torch.ones(3, 3)
    W[1, 2] = value
    with pytest.raises(UserError, match="NaN or infinity"):
        linalg.svd(W)


def test_break_even_rank_is_the_largest_that_saves() -> None:
    for outputs in range(1, 40):
        for inputs in range(1, 40):
            saving = [k for k in range(1, 40) if k * (outputs + inputs) < outputs * inputs]
            assert linalg.break_even_rank(outputs, inputs) == max(saving, default=0)
    assert linalg.break_even_rank(64, 576) == 57


def test_effective_ranks_of_known_spectra() -> None:
    flat, single, zero = torch.full((9,), 0.5), torch.eye(9)[0], torch.zeros(9)
    assert linalg.stable_rank(torch.stack([flat, single, zero])).tolist() == [9, 1, 0]
    np.testing.assert_allclose(linalg.hoyer(torch.stack([flat, single, zero])), [3, 1, 0], rtol=1e-6)


def any_factors(shape: tuple[int, ...], seed: int) -> linalg.SVD:
    """As they come out of training: U and V not orthonormal, singular values of either sign, in no order."""
    groups, outputs, inputs = shape
    rank = min(outputs, inputs)
    return linalg.SVD(
        drawn((groups, outputs, rank), seed), drawn((groups, rank), seed + 1), drawn((groups, rank, inputs), seed + 2)
    )


def whole(factors: linalg.SVD) -> Tensor:
    return truncated(factors, factors.S_R.shape[-1])


@many
@given(shapes, seeds)
def test_orthogonalised_factors_are_the_svd_of_the_same_matrix(shape: tuple[int, ...], seed: int) -> None:
    before = any_factors(shape, seed)
    after = linalg.orthogonalised(before)
    torch.testing.assert_close(whole(after), whole(before))
    torch.testing.assert_close(after.S_R, linalg.svd(whole(before)).S_R)
    torch.testing.assert_close(linalg.orthogonality(after), torch.zeros(()).double(), atol=1e-20, rtol=0)


def test_orthogonality_by_hand() -> None:
    factors = linalg.SVD(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.ones(2), torch.eye(2))
    assert linalg.orthogonality(factors) == pytest.approx(9 / 4)  # (2^2 - 1)^2 / R^2


@many
@given(shapes, seeds)
def test_a_carried_velocity_moves_the_matrix_the_same_way(shape: tuple[int, ...], seed: int) -> None:
    before, velocity = any_factors(shape, seed), any_factors(shape, seed + 3)
    velocity = velocity._replace(S_R=torch.zeros_like(velocity.S_R))  # of S only the diagonal is carried
    after = linalg.orthogonalised(before)
    carried = linalg.carried(velocity, before, after)

    def motion(at: linalg.SVD, by: linalg.SVD) -> Tensor:
        return (by.U_OR * at.S_R[..., None, :]) @ at.Vh_RI + (at.U_OR * at.S_R[..., None, :]) @ by.Vh_RI

    torch.testing.assert_close(motion(after, carried), motion(before, velocity), atol=1e-6, rtol=1e-6)


def test_a_velocity_of_the_singular_values_follows_their_order_and_sign() -> None:
    U, Vh = (torch.linalg.qr(drawn((5, 3), seed)).Q for seed in (0, 1))
    before = linalg.SVD(U, torch.tensor([1.0, -3.0, 2.0]).double(), Vh.mT)
    velocity = linalg.SVD(torch.zeros_like(U), torch.tensor([0.1, 0.2, 0.3]).double(), torch.zeros_like(Vh.mT))
    after = linalg.orthogonalised(before)
    torch.testing.assert_close(after.S_R, torch.tensor([3.0, 2.0, 1.0]).double())
    torch.testing.assert_close(linalg.carried(velocity, before, after).S_R, torch.tensor([-0.2, 0.3, 0.1]).double())
