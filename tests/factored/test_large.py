"""Large matrices: what the Gram matrix costs in accuracy is within its bound, and beyond it the SVD takes over."""

from typing import Any

import pytest
import scipy.linalg
import torch
from torch import Tensor

from spectrim.decomposers.svd import SVD
from spectrim.decomposers.whitened import WhitenedSVD
from spectrim.errors import UserError
from spectrim.factored import large, linalg

E = torch.finfo(torch.float64).eps
SHAPES = [(60, 60), (90, 60), (60, 90), (2, 60, 70)]


@pytest.fixture
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    for least in ("LARGE", "WHITENED"):
        monkeypatch.setattr(large, least, 50)


@pytest.fixture
def no_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linalg, "svd", lambda *_: pytest.fail("LAPACK's SVD"))


def tail(S_R: Tensor) -> Tensor:
    return linalg.tail_sums(S_R.square()).sqrt()


def matrix(shape: tuple[int, ...], smallest: float) -> Tensor:
    """A matrix whose singular values fall evenly, on a logarithmic scale, from 3 to 3 times ``smallest``."""
    U, S, Vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    falling = 3 * torch.logspace(0, torch.tensor(smallest).log10().item(), S.shape[-1], dtype=torch.float64)
    return U * falling @ Vh


def moment(count: int, smallest: float) -> Tensor:
    vectors = torch.linalg.qr(torch.randn(count, count, dtype=torch.float64)).Q
    return vectors * torch.logspace(0, torch.tensor(smallest).log10().item(), count, dtype=torch.float64) @ vectors.mT


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("smallest", [0.5, 1e-2, 2e-5])
def test_the_svd_of_a_large_matrix_is_within_its_bounds(
    shape: tuple[int, ...], smallest: float, small_is_large: None
) -> None:
    W = matrix(shape, smallest)
    exact = linalg.svd(W)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linalg, "svd", lambda *_: pytest.fail("LAPACK's SVD"))
        U, S, Vh = large.svd(W)
    R, top = S.shape[-1], float(S.max())
    torch.testing.assert_close(U * S.unsqueeze(-2) @ Vh, W, atol=100 * E * top, rtol=0)
    assert (S.diff(dim=-1) <= 0).all()
    tall = shape[-2] >= shape[-1]
    exactly, derived = (Vh.mT, U) if tall else (U, Vh.mT)
    eye = torch.eye(R, dtype=torch.float64)
    assert float((exactly.mT @ exactly - eye).abs().max()) < 100 * E
    allowed = 10 * E * top**2 / (S.unsqueeze(-1) * S.unsqueeze(-2))
    assert ((derived.mT @ derived - eye).abs() <= allowed + 100 * E).all()
    for k in range(R + 1):
        left = W - U[..., :k] * S[..., None, :k] @ Vh[..., :k, :]
        squared = left.square().sum((-2, -1))
        torch.testing.assert_close(squared.sqrt(), tail(S)[..., k], atol=1e-13, rtol=1e-9)
        assert (squared - tail(exact.S_R)[..., k].square() <= 10 * R * E * top**2).all()


@pytest.mark.parametrize(
    "make", [lambda: matrix((60, 70), 1e-6), lambda: torch.zeros(60, 70).double(), lambda: torch.ones(60, 70).double()]
)
def test_a_matrix_that_the_gram_matrix_would_spoil_is_decomposed_by_the_svd(make: Any, small_is_large: None) -> None:
    W = make()
    for found, exact in zip(large.svd(W), linalg.svd(W), strict=True):
        assert torch.equal(found, exact)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((60, 49), torch.float64), ((49, 60), torch.float64), ((60, 60), torch.float32)]
)
def test_small_matrices_and_those_in_float32_are_decomposed_by_the_svd(
    shape: tuple[int, int], dtype: torch.dtype, small_is_large: None
) -> None:
    W, C = torch.randn(shape).to(dtype), moment(shape[1], 0.1).to(dtype)
    for found, exact in zip(large.svd(W), linalg.svd(W), strict=True):
        assert torch.equal(found, exact)
    exact = linalg.svd(linalg.whitened(W, C, 1e-6))
    for found, other in zip(large.left_vectors(W, C, 1e-6), exact[:2], strict=True):
        assert torch.equal(found, other)


def test_the_published_numbers_come_from_the_svd() -> None:
    assert large.LARGE == 2048  # above every matrix of the tables


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("smallest", [0.5, 1e-4, 1e-12])
def test_the_left_vectors_of_a_whitened_large_matrix_are_within_their_bounds(
    shape: tuple[int, ...], diagonal: bool, smallest: float, small_is_large: None
) -> None:
    W, C = matrix(shape, 1e-4), moment(shape[-1], smallest).expand(*shape[:-2], -1, -1)
    C = C.diagonal(dim1=-2, dim2=-1) if diagonal else C
    root = linalg.whitened(W, C, 1e-6)
    exact = linalg.svd(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linalg, "svd", lambda *_: pytest.fail("LAPACK's SVD"))
        U, S = large.left_vectors(W, C, 1e-6)
    R, top = S.shape[-1], float(S.max())
    assert U.shape == exact.U_OR.shape and (S.diff(dim=-1) <= 0).all()
    assert float((U.mT @ U - torch.eye(R, dtype=torch.float64)).abs().max()) < 100 * E
    torch.testing.assert_close(U @ (U.mT @ W), W, atol=100 * E * 3, rtol=0)
    for k in range(R + 1):
        squared = (root - U[..., :k] @ (U[..., :k].mT @ root)).square().sum((-2, -1))
        assert (squared - tail(exact.S_R)[..., k].square() <= 10 * R * E * top**2).all()
        assert (squared - tail(S)[..., k].square() <= 10 * R * E * top**2).all()


def test_where_the_eigenvectors_fail_the_svd_takes_over(small_is_large: None, monkeypatch: pytest.MonkeyPatch) -> None:
    W, C = matrix((60, 60), 0.1), torch.rand(60).double()
    exact = linalg.svd(W), linalg.svd(linalg.whitened(W, C, 1e-6))

    def fails(*_: Any) -> Any:
        raise torch.linalg.LinAlgError

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    assert torch.equal(large.svd(W).S_R, exact[0].S_R)
    assert torch.equal(large.left_vectors(W, C, 1e-6)[1], exact[1].S_R)


def test_what_is_not_finite_is_refused(small_is_large: None) -> None:
    W, C = matrix((60, 60), 0.1), moment(60, 0.1)
    spoilt = W.clone()
    spoilt[3, 4] = torch.nan
    with pytest.raises(UserError, match="a weight holds NaN or infinity"):
        large.svd(spoilt)
    with pytest.raises(UserError, match="a weight holds NaN or infinity"):
        large.left_vectors(spoilt, C, 1e-6)
    with pytest.raises(UserError, match="the inputs of a layer hold NaN or infinity"):
        large.left_vectors(W, C * torch.inf, 1e-6)


def test_decomposers_take_the_fast_way(small_is_large: None, no_svd: None) -> None:
    layer = torch.nn.Linear(60, 70)
    spectra = SVD().spectrum(layer), WhitenedSVD().spectrum(layer, {"linear": moment(60, 0.1).unsqueeze(0)})
    for spectrum in spectra:
        torch.testing.assert_close(spectrum.factor(60).weight, layer.weight)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (25, 25)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_truncation_by_the_gram_matrix_is_that_by_the_svd(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    U, _, Vh = linalg.svd(torch.randn(shape, dtype=torch.float64))
    W = ((U * torch.logspace(0, -9, min(shape), dtype=torch.float64)) @ Vh).to(dtype)  # ten orders of magnitude
    svd = linalg.svd(W.double())
    rounding = {torch.float32: 3e-7, torch.float64: 1e-8}[dtype]  # of the factors; of the Gram matrix
    for rank in (1, 5, 11):
        B, A = large.truncated(lambda: W.clone(), rank)
        error = (B.double() @ A.double() - W.double()).norm()
        assert error <= tail(svd.S_R)[rank] * (1 + 1e-6) + rounding
        assert B.dtype == A.dtype == dtype and B.is_contiguous() and A.is_contiguous()
        torch.testing.assert_close(B.norm(dim=0), A.norm(dim=1))
        assert (B.norm(dim=0).diff() <= 0).all()


@pytest.mark.parametrize("W", [torch.zeros(9, 6), torch.eye(8), torch.ones(6, 9)])
@pytest.mark.parametrize("fails", [False, True])
def test_matrices_without_a_gap_or_a_full_rank(W: Tensor, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    eigh, used = scipy.linalg.eigh, []

    def one(matrix: Any, driver: str, **settings: Any) -> Any:
        used.append(driver)
        if fails and driver == "evr":
            matrix[:] = 0.0  # it has begun to overwrite
            raise scipy.linalg.LinAlgError
        return eigh(matrix, driver=driver, **settings)

    monkeypatch.setattr(scipy.linalg, "eigh", one)
    B, A = large.truncated(W.clone, 2)
    expected = tail(linalg.svd(W).S_R)[2]
    torch.testing.assert_close((B @ A - W).norm(), expected, atol=1e-6, rtol=1e-5)
    assert used == (["evr", "ev"] if fails else ["evr"])
