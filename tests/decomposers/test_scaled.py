"""ASVD's scaled SVD lies between the plain one and whitening by the diagonal of the second moment."""

from typing import Any

import pytest
import torch
from torch import nn

from spectrim.decomposers.scaled import ScaledSVD
from spectrim.decomposers.svd import SVD
from spectrim.decomposers.whitened import WhitenedSVD
from spectrim.errors import UserError

MOMENT = torch.diag(torch.logspace(0, -3, 9)).double().unsqueeze(0)


def test_an_exponent_of_0_is_the_plain_svd_and_of_1_whitening_by_the_diagonal(weight_of: Any) -> None:
    layer, together = nn.Linear(9, 6).double(), 0.01 * torch.ones(9, 9).double()
    for alpha, other in ((0.0, SVD()), (1.0, WhitenedSVD(ridge=1e-9))):
        mine = ScaledSVD(alpha=alpha, ridge=1e-9).spectrum(layer, {"linear": MOMENT})
        theirs = other.spectrum(layer, {"linear": MOMENT})
        torch.testing.assert_close(weight_of(mine.factor(3), 1), weight_of(theirs.factor(3), 1), atol=1e-6, rtol=1e-6)
    mine = ScaledSVD(alpha=1.0).spectrum(layer, {"linear": MOMENT + together - together.diagonal().diag()})
    same = ScaledSVD(alpha=1.0).spectrum(layer, {"linear": MOMENT})
    assert weight_of(mine.factor(3), 1).equal(weight_of(same.factor(3), 1))  # how inputs go together does not count


def test_columns_of_large_inputs_are_approximated_better(weight_of: Any) -> None:
    layer = nn.Linear(9, 6).double()
    change = {
        alpha: weight_of(ScaledSVD(alpha=alpha).spectrum(layer, {"linear": MOMENT}).factor(3), 1) - layer.weight
        for alpha in (0.0, 0.5)
    }
    assert float(change[0.5][:, 0].detach().norm()) < float(change[0.0][:, 0].detach().norm())


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_full_rank_gives_the_weight_back_where_inputs_are_zero(alpha: float, weight_of: Any) -> None:
    layer = nn.Linear(9, 6).double()
    for moment in (torch.zeros(1, 9, 9).double(), MOMENT * (torch.arange(9) < 2)):
        spectrum = ScaledSVD(alpha=alpha).spectrum(layer, {"linear": moment})
        torch.testing.assert_close(weight_of(spectrum.factor(6), 1), layer.weight, atol=1e-9, rtol=1e-9)


def test_bad_input_is_one_line() -> None:
    for wrong in ({"alpha": 1.5}, {"ridge": 0.0}, {"samples": 0}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))} must"):
            ScaledSVD(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="NaN or infinity"):
        ScaledSVD().spectrum(nn.Linear(9, 6), {"linear": MOMENT * float("nan")})
    with pytest.raises(UserError, match="second moment"):
        ScaledSVD().spectrum(nn.Linear(9, 6))
