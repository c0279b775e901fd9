"""A refit by the loss makes the errors small that the loss feels, whatever the form of the factors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spectrim
from spectrim.algorithms.refitted import Refitted
from spectrim.algorithms.related.knapsack import Knapsack
from spectrim.decomposers.subspaces import SubspaceSVD
from spectrim.decomposers.svd import SVD
from spectrim.decomposers.tucker2 import Tucker2
from spectrim.errors import MissingInput, UserError
from spectrim.factored.plan import RankPlan
from spectrim.refit import weighting
from spectrim.refit.factors import refit
from spectrim.refit.weighting import output_weights, roots_of, weights_of
from spectrim.statistics.objective import Objective
from spectrim.surgery import replacing
from spectrim.tools import resume
from spectrim.tools.spill import SpilledTensors

Make = Callable[[nn.Module], Any]
FORMS: dict[str, Make] = {
    "channel": SVD("channel").spectrum,
    "spatial": SVD("spatial").spectrum,
    "subspaces": SubspaceSVD(2, "channel").spectrum,
    "pivoted channel": SVD("channel", factors="pivoted").spectrum,
    "pivoted spatial": SVD("spatial", factors="pivoted").spectrum,
    "tucker": Tucker2().spectrum,
}


def one(layer: nn.Module, make: Make, rank: int) -> tuple[nn.Module, nn.Module]:
    """Return a model of one layer, and the same with its weight at ``rank``."""
    dense = nn.Sequential(layer).eval()
    spectrum = make(layer)
    return dense, replacing.apply(dense, RankPlan.of({"0": spectrum.kept(rank)}), {"0": spectrum})


def squared(error_NO: Tensor, groups: int, metric_gOO: Tensor) -> float:
    """Return the mean of ``e^T M e`` over the errors at all positions, added up over groups."""
    error_NgO = error_NO.double().unflatten(1, (groups, -1))
    return float(torch.einsum("ngo,gop,ngp->n", error_NgO, metric_gOO, error_NgO).mean())


def errors(dense: nn.Module, model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(x) - dense(x)
    return found.movedim(1, -1).flatten(0, -2) if found.ndim == 4 else found


def uneven(groups: int, outputs: int) -> Tensor:
    """Return weights of outputs that differ by orders of magnitude, as those of trained networks do."""
    root = torch.randn(groups, outputs, outputs, dtype=torch.float64) * torch.logspace(0, -3, outputs).double()
    return 1e-6 * root @ root.mT


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("groups", [1, 2])
def test_each_way_is_the_better_one_by_its_own_measure(make: Make, groups: int) -> None:
    layer, x = nn.Conv2d(4, 8, 3, groups=groups), torch.randn(60, 4, 6, 7) * torch.tensor([1, 3, 0.3, 1]).view(4, 1, 1)
    G = uneven(groups, 8 // groups)
    data = Objective(F.mse_loss, {"calibration": [(x, torch.zeros(60, 8, 4, 5))]})
    metric = torch.stack([root @ root for root in roots_of(G)[0]])
    plain, by_loss = {}, {}
    for found, weights in ((plain, None), (by_loss, {"0": G})):
        dense, model = one(layer, make, 2)
        refit(model, dense, data, 60, weights=weights)
        error = errors(dense, model, x)
        found |= {"metric": squared(error, groups, metric), "plain": float(error.square().sum(1).mean())}
    assert by_loss["metric"] < 0.99 * plain["metric"]
    assert plain["plain"] < 0.99 * by_loss["plain"]


def test_a_linear_reaches_the_best_of_its_rank_in_the_measure() -> None:
    """Weighted reduced-rank regression: the tail of the singular values of ``M^(1/2) W C^(1/2)``."""
    layer, x, G = nn.Linear(7, 5), torch.randn(500, 7) @ torch.randn(7, 7), uneven(1, 5)
    dense, model = one(layer, SVD().spectrum, 2)
    refit(model, dense, Objective(F.mse_loss, {"calibration": [(x, torch.zeros(500, 5))]}), 500, weights={"0": G})
    root = roots_of(G)[0][0]
    outputs = ((x - x.mean(0)) @ layer.weight.T).detach().double() @ root
    best = float(torch.linalg.svdvals(outputs)[2:].square().sum()) / 500
    assert squared(errors(dense, model, x), 1, (root @ root)[None]) == pytest.approx(best, rel=2e-2)


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_outputs_that_count_alike_are_fitted_as_without_weights(weight: float) -> None:
    """Also those that the loss does not feel at all."""
    layer, x = nn.Linear(7, 5), torch.randn(200, 7)
    data = Objective(F.mse_loss, {"calibration": [(x, torch.zeros(200, 5))]})
    found = []
    for weights in (None, {}, {"0": weight * torch.eye(5, dtype=torch.float64)[None]}):
        dense, model = one(layer, SVD().spectrum, 2)
        refit(model, dense, data, 200, weights=weights)
        found.append(model(x))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0], atol=1e-5, rtol=1e-4)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.body, self.head = nn.Embedding(30, 8), nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.words(tokens).mean(1))))


def tokens(count: int = 40) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randint(0, 30, (20, 6)), torch.randint(0, 4, (20,))) for _ in range(count // 20)]


def test_the_weights_are_the_fisher_information_of_the_outputs() -> None:
    """At the scores it is known: ``E[diag(p) - p p^T]``."""
    model, data = Classifier().eval(), Objective(F.cross_entropy, {"calibration": tokens(8000)})
    found = output_weights("loss", model, ["words", "body", "head"], data, 8000)
    assert found is not None and found.keys() == {"body", "head"}
    with torch.no_grad():
        p = torch.cat([model(x) for x, _ in data.splits["calibration"]]).softmax(1).double()
    wanted = torch.diag(p.mean(0)) - p.T @ p / len(p)
    G = weights_of(found, "head")
    assert G is not None
    torch.testing.assert_close(G[0], wanted, atol=0.02, rtol=0)


def test_layers_in_blocks_have_the_same_weights_and_are_refitted_alike() -> None:
    model, batches, found = Classifier().eval(), tokens(), []
    for at_once in (None, 1):
        data = Objective(F.cross_entropy, {"calibration": batches}, layers_at_once=at_once)
        weights = output_weights("loss", model, ["body", "head"], data, 40)
        assert weights is not None
        found.append([weights_of(weights, name) for name in ("body", "head")])
        assert isinstance(weights["body"], Tensor if at_once is None else SpilledTensors)
    for all_at_once, one_by_one in zip(*found, strict=True):
        torch.testing.assert_close(all_at_once, one_by_one)


def test_a_killed_process_takes_the_weights_up(tmp_path: Path) -> None:
    model, batches = Classifier().eval(), tokens()

    def found(samples: int = 40, data: Any = batches) -> Tensor:
        with resume.into(tmp_path):
            weights = output_weights(
                "loss", model, ["head"], Objective(F.cross_entropy, {"calibration": data}), samples
            )
        G = weights_of(weights, "head")
        assert G is not None
        return G

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "WORTH_SECONDS", 0)
        first = found()
        patch.setattr(weighting, "output_moments", None)  # it is not called again
        assert torch.equal(found(), first)
        for others in ({"samples": 20}, {"data": tokens()}):
            with pytest.raises(TypeError):
                found(**others)


def test_outputs_need_no_weights_and_no_targets() -> None:
    bare: Any = [(x, None) for x, _ in tokens()]
    data = Objective(F.cross_entropy, {"calibration": bare})
    assert output_weights("outputs", Classifier(), ["body"], data, 40) is None
    with pytest.raises(MissingInput, match="no targets, which the loss needs"):
        output_weights("loss", Classifier(), ["body"], data, 40)


def test_gradients_that_are_not_finite_are_refused_with_the_layer() -> None:
    class Rooted(Classifier):
        def forward(self, tokens: Tensor) -> Tensor:
            y = self.body(self.words(tokens).mean(1))
            return self.head(y) + (y - y.detach()).abs().sqrt().sum(1, keepdim=True)  # its gradient is infinite

    with pytest.raises(UserError, match="layer body: the gradients at its outputs hold NaN or infinity"):
        output_weights("loss", Rooted(), ["body"], Objective(F.cross_entropy, {"calibration": tokens()}), 40)


def test_joint_selection_refits_by_the_loss_and_other_algorithms_where_they_are_told_to() -> None:
    torch.manual_seed(0)
    model, batches = Classifier().eval(), tokens()
    results = {}
    for by in ("loss", "outputs"):
        for name, algorithm in {
            "joint": spectrim.Joint(params_kept=0.8, refit_by=by),  # type: ignore[arg-type]
            "knapsack": Refitted(
                Knapsack(params_kept=0.8),
                refit_by=by,  # type: ignore[arg-type]
            ),
        }.items():
            made = spectrim.compress(model, calibration=batches, algorithm=algorithm)
            results[name, by] = made.model(batches[0][0])
    assert not torch.equal(results["joint", "loss"], results["joint", "outputs"])
    assert not torch.equal(results["knapsack", "loss"], results["knapsack", "outputs"])
    assert spectrim.Joint(params_kept=0.5).refit_by == "loss"
