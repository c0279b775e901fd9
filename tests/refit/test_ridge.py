"""A layer that sees few samples is held as firmly as samples that the fit has not seen ask for."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.decomposers.svd import SVD
from spectrim.factored.plan import RankPlan
from spectrim.refit import factors, ridge
from spectrim.refit.moments import Flows, Moments, moments_of
from spectrim.refit.ridge import RIDGE, RIDGES, chosen_ridge
from spectrim.statistics.objective import Objective
from spectrim.statistics.processes import ALONE
from spectrim.surgery import replacing


def flows_of(x: Tensor, y: Tensor, sizes: list[int], masks: Any = None) -> Flows:
    return Flows(list(x.split(sizes)), list(y.split(sizes)), masks or [None] * len(sizes))


def brute(x: Tensor, y: Tensor, W_OI: Tensor, G_OO: Tensor, centred: bool) -> list[float]:
    """Return the error of each ridge from the rows themselves."""
    root, errors = factors.roots_of(G_OO.unsqueeze(0))[0][0], []
    for one in RIDGES:
        error = 0.0
        for fold in range(5):
            seen = torch.ones(len(x), dtype=torch.bool)
            seen[fold::5] = False
            x_mean, y_mean = (v[seen].mean(0) if centred else torch.zeros(v.shape[1]).to(v) for v in (x, y))
            a, b = x[seen] - x_mean, y[seen] - y_mean
            C = a.mT @ a / len(a)
            penalty = one * C.diagonal().mean() * torch.eye(len(C)).to(C)
            W = torch.linalg.solve(C + penalty, a.mT @ b / len(a) + penalty @ W_OI.mT).mT
            rest = (y[~seen] - y_mean - (x[~seen] - x_mean) @ W.mT) @ root
            plain = (y[~seen] - y_mean) @ root  # what no weight changes
            error += float(rest.square().sum() - plain.square().sum())
        errors.append(error)
    return errors


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("sizes", [[40], [16, 16, 8], [1] * 40])
def test_the_errors_are_those_of_the_rows(centred: bool, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    x, G = torch.randn(40, 12).double() + 0.5, torch.randn(6, 6).double()
    W, G = torch.randn(6, 12).double(), G @ G.mT
    y, layer = x @ torch.randn(12, 6).double() + torch.randn(40, 6), nn.Linear(12, 6).double()
    flows = flows_of(x, y, sizes)
    made, errors = list[Tensor](), ridge._errors

    def noted(*given: Any) -> Tensor:
        made.append(errors(*given))
        return made[-1]

    monkeypatch.setattr(ridge, "_errors", noted)
    chosen = chosen_ridge(layer, flows, ALONE, moments_of(layer, flows, ALONE), centred, W[None], G[None])
    found = 8 * torch.stack(made).sum(0)
    expected = brute(x, y, W, G, centred)
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-4, atol=1e-4)
    assert chosen == RIDGES[expected.index(min(expected))]


@pytest.mark.parametrize(("noise", "least"), [(0.0, True), (10.0, False)])
def test_noise_asks_for_a_firm_hold(noise: float, least: bool) -> None:
    torch.manual_seed(0)
    x, W = torch.randn(60, 20), torch.randn(4, 20)
    y, layer = x @ torch.randn(20, 4) + noise * torch.randn(60, 4), nn.Linear(20, 4)
    flows, G = flows_of(x, y, [30, 30]), torch.eye(4).double()[None]
    found = chosen_ridge(layer, flows, ALONE, moments_of(layer, flows, ALONE), True, W.double()[None], G)
    assert (found == RIDGE) is least and (found >= 0.1) is not least


def test_many_rows_keep_the_least_ridge_and_are_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge, "sums_of", lambda *_: pytest.fail("a fold was summed"))
    moments = Moments(20, *(torch.zeros(1, *side) for side in ((4, 4), (3, 4), (4,), (3,))))
    W, G = torch.ones(1, 3, 4), torch.ones(1, 3, 3)
    assert chosen_ridge(nn.Linear(4, 3), Flows([], [], []), ALONE, moments, True, W, G) == RIDGE


@pytest.mark.parametrize("side", [2, 10])
def test_the_folds_hold_every_row_once(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask of another shape than the rows says nothing of them, also where a fold has its shape."""
    rows, errors = list[int](), ridge._errors
    monkeypatch.setattr(ridge, "_errors", lambda *given: rows.append(given[1].rows) or errors(*given))  # type: ignore
    x, mask, layer = torch.randn(10, 3, 12), torch.ones(side, 3), nn.Linear(12, 4)
    mask[:, 2] = 0
    flows, G = Flows([x], [x[..., :4]], [mask]), torch.eye(4).double()[None]
    moments = moments_of(layer, flows, ALONE)
    chosen_ridge(layer, flows, ALONE, moments, True, torch.ones(1, 4, 12).double(), G)
    assert len(rows) == 5 and sum(rows) == moments.rows == {2: 30, 10: 20}[side]


def test_a_ridge_without_a_fit_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding may leave moments that a small penalty does not make positive."""
    found = torch.tensor([torch.nan, 3.0, 2.0, *[5.0] * (len(RIDGES) - 3)]).double()
    monkeypatch.setattr(ridge, "_errors", lambda *_: found)
    x, layer = torch.randn(10, 8), nn.Linear(8, 3)
    flows, G = flows_of(x, x[:, :3], [10]), torch.eye(3).double()[None]
    moments = moments_of(layer, flows, ALONE)
    assert chosen_ridge(layer, flows, ALONE, moments, True, torch.ones(1, 3, 8).double(), G) == RIDGES[2]


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("value", [0.0, 1.0, 1e200, torch.nan])
def test_hopeless_rows_end_in_a_ridge_of_the_list(rows: int, value: float) -> None:
    x, layer = torch.full((rows, 8), value, dtype=torch.float64), nn.Linear(8, 3).double()
    flows, G = flows_of(x, x[:, :3], [rows]), torch.eye(3).double()[None]
    found = chosen_ridge(layer, flows, ALONE, moments_of(layer, flows, ALONE), True, torch.ones(1, 3, 8).double(), G)
    assert found in RIDGES


def test_padding_is_left_out() -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(12, 5, 30), torch.ones(12, 5)
    mask[:, 3:] = 0
    layer, y = nn.Linear(30, 4), torch.randn(12, 5, 4)
    W, G = torch.randn(1, 4, 30).double(), torch.eye(4).double()[None]

    def chosen(x: Tensor) -> float:
        flows = flows_of(x, y, [7, 5], list(mask.split([7, 5])))
        return chosen_ridge(layer, flows, ALONE, moments_of(layer, flows, ALONE), True, W, G)

    assert chosen(x) == chosen(torch.where(mask.bool().unsqueeze(-1), x, 1e6)) > RIDGE


def test_a_refit_by_the_loss_of_few_samples_does_better_on_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The targets of a layer hold what its inputs do not: here the noise that a cut first layer adds."""

    def error(ridges: tuple[float, ...]) -> float:
        monkeypatch.setattr(ridge, "RIDGES", ridges)
        total = 0.0
        for seed in range(5):
            torch.manual_seed(seed)
            net = nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 10)).eval()
            data = Objective(F.cross_entropy, {"calibration": [(torch.randn(70, 40), torch.zeros(70).long())]})
            spectra: dict[str, Any] = {"0": SVD().spectrum(net[0]), "2": SVD().spectrum(net[2])}
            kept = {"0": spectra["0"].kept(12), "2": spectra["2"].kept(8)}
            model = replacing.apply(copy.deepcopy(net), RankPlan.of(kept), spectra)
            weights = {"0": torch.eye(60).double()[None], "2": torch.eye(10).double()[None]}
            factors.refit(model, net, data, 70, weights)
            x = torch.randn(2000, 40)
            with torch.no_grad():
                total += float((model(x) - net(x)).square().mean())
        return total

    assert error(RIDGES) < 0.9 * error((RIDGE,))
