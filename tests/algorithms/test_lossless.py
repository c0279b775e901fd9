"""Lossless takes, in each layer, the rank of the most negative first-order change, and verified means verified."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.algorithms.compact import Compact
from spectrim.algorithms.lossless import Lossless
from spectrim.algorithms.shared.neighbourhood import Neighbourhood
from spectrim.batches import evaluating
from spectrim.decomposers.svd import SVD
from spectrim.errors import UserError
from spectrim.statistics.objective import Objective

LAYERS = ("0", "3", "6", "8")


def searched(net: nn.Sequential, batches: Any, view: Any, weight_of: Any) -> dict[str, list[tuple[Tensor, float]]]:
    """By brute force, for every layer and rank below break-even: the change of the weight, and <G, change>."""
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    weights = [net.get_submodule(name).weight for name in LAYERS]
    with evaluating(net):
        gradients = torch.autograd.grad(F.cross_entropy(net(x), y), weights)
    found: dict[str, list[tuple[Tensor, float]]] = {}
    for name, weight, gradient in zip(LAYERS, weights, gradients, strict=True):
        layer = net.get_submodule(name)
        spectrum = SVD(view).spectrum(layer)
        found[name] = []
        for rank in range(1, spectrum.max_rank + 1):
            factored = spectrum.factor(rank)
            if factored.first.weight.numel() + factored.second.weight.numel() < weight.numel():
                change = (weight_of(factored, getattr(layer, "groups", 1)) - weight).detach()
                found[name].append((change, float((gradient * change).sum())))
    return found


@pytest.mark.parametrize("view", ["channel", "spatial"])
def test_each_layer_takes_the_most_negative_change(
    net: nn.Sequential, batches: Any, objective: Objective, weight_of: Any, view: Any
) -> None:
    compressed = Lossless(gamma=None).compress(net, SVD(view), objective)
    for name, ranks in searched(net, batches, view, weight_of).items():
        best = min(range(len(ranks)), key=lambda i: ranks[i][1], default=None)
        if best is None or ranks[best][1] >= 0:
            assert name not in compressed.plan
        else:
            assert compressed.plan[name].rank == best + 1
            row = compressed.report.set_index("layer").loc[name]
            assert row["predicted_change"] == pytest.approx(ranks[best][1], rel=1e-3, abs=1e-6)
    assert compressed.plan and compressed.predicted_change < 0


@pytest.mark.parametrize(
    ("norm", "gamma", "size"),
    [
        ("entrywise", 0.1, lambda change, weight: change.abs().max()),
        ("relative", 0.6, lambda change, weight: change.norm() / weight.norm()),
        ("frobenius", 1.3, lambda change, weight: change.norm()),
    ],
)
def test_only_ranks_inside_the_neighbourhood_are_taken(
    net: nn.Sequential, batches: Any, objective: Objective, weight_of: Any, norm: Any, gamma: float, size: Any
) -> None:
    compressed = Lossless(norm=norm, gamma=gamma).compress(net, SVD(), objective)
    shut_out = 0
    for name, ranks in searched(net, batches, "channel", weight_of).items():
        weight = net.get_submodule(name).weight.detach()
        inside = {k: ranks[k - 1][1] for k in range(1, len(ranks) + 1) if size(ranks[k - 1][0], weight) <= gamma}
        shut_out += len(ranks) - len(inside)
        best = min(inside, key=inside.__getitem__, default=None)
        expected = best if best is not None and inside[best] < 0 else None
        assert (compressed.plan[name].rank if name in compressed.plan else None) == expected
    assert shut_out


def test_a_neighbourhood_holds_ranks_from_one_to_break_even() -> None:
    spectrum = SVD().spectrum(nn.Linear(12, 9))
    assert Neighbourhood().ranks(spectrum).tolist() == [1, 2, 3, 4, 5]
    assert Neighbourhood(gamma=1e-9).ranks(spectrum).tolist() == []
    by_error = Neighbourhood("frobenius", float(spectrum.error()[3])).ranks(spectrum)
    assert by_error.tolist() == [3, 4, 5]


@pytest.mark.parametrize("split", ["calibration", "train"])
@pytest.mark.parametrize("order", ["network", "reverse", "saving", "predicted"])
@pytest.mark.parametrize("refresh", [False, True])
@pytest.mark.parametrize("tolerance", [0.0, 0.02])
def test_verified_never_lifts_the_loss_above_the_tolerance(
    net: nn.Sequential, objective: Objective, split: Any, order: Any, refresh: bool, tolerance: float
) -> None:
    settings = Lossless(
        gamma=None, verified=True, verify_on=split, order=order, refresh=refresh, verified_tolerance=tolerance, tries=3
    )
    compressed = settings.compress(net, SVD(), objective)
    dense, after = (objective.evaluate(model, split).loss for model in (net, compressed.model))
    assert after <= dense + tolerance
    accepted = [step for step in compressed.log if step["accepted"]]
    assert {step["layer"]: step["rank"] for step in accepted} == {name: k.rank for name, k in compressed.plan.items()}
    assert sum(step["measured"] for step in accepted) == pytest.approx(after - dense, abs=1e-6)
    tried = [step["layer"] for step in compressed.log]
    assert max(tried.count(name) for name in tried) <= 3
    visited = list(dict.fromkeys(tried))
    if order in ("network", "reverse"):
        assert visited == sorted(visited, key=LAYERS.index, reverse=order == "reverse")
    elif order == "saving":
        assert visited == sorted(visited, key=lambda name: -net.get_submodule(name).weight.numel())
    elif not refresh:
        first = {name: next(s["predicted"] for s in compressed.log if s["layer"] == name) for name in visited}
        assert visited == sorted(visited, key=first.__getitem__)


@pytest.mark.parametrize("tolerance", [0.0, 0.002, 0.02])
@pytest.mark.parametrize("tries", [1, 3, 99])
def test_verified_accepts_the_first_candidate_whose_loss_is_within_the_tolerance(
    net: nn.Sequential, batches: Any, objective: Objective, weight_of: Any, tolerance: float, tries: int
) -> None:
    compressed = Lossless(
        gamma=None, verified=True, verify_on="calibration", verified_tolerance=tolerance, tries=tries
    ).compress(net, SVD(), objective)
    working = copy.deepcopy(net)
    limit = objective.evaluate(net).loss + tolerance
    expected, at_the_edge = {}, 0
    for name, ranks in searched(net, batches, "channel", weight_of).items():
        falling = sorted((change, rank) for rank, (_, change) in enumerate(ranks, 1) if change < 0)
        spread = torch.linspace(0, len(falling) - 1, min(tries, len(falling))).round().int().tolist()
        for _, rank in (falling[i] for i in spread):
            trial = copy.deepcopy(working)
            trial[int(name)] = SVD().spectrum(net.get_submodule(name)).factor(rank)
            loss = objective.evaluate(trial).loss
            if loss <= limit:
                at_the_edge += loss > objective.evaluate(working).loss  # a rise that earlier layers paid for
                expected[name], working = rank, trial
                break
    assert {name: kept.rank for name, kept in compressed.plan.items()} == expected
    assert at_the_edge or tolerance < 0.02


def test_refresh_predicts_from_the_gradient_of_the_partly_factored_model(
    net: nn.Sequential, objective: Objective, batches: Any, weight_of: Any
) -> None:
    log = (
        Lossless(gamma=None, verified=True, verify_on="calibration", refresh=True, verified_tolerance=1.0, tries=1)
        .compress(net, SVD(), objective)
        .log
    )
    first, second = log[0], log[1]
    working = copy.deepcopy(net)
    working[int(first["layer"])] = SVD().spectrum(net.get_submodule(first["layer"])).factor(first["rank"])
    layer = working.get_submodule(second["layer"])
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with evaluating(working):
        (gradient,) = torch.autograd.grad(F.cross_entropy(working(x), y), layer.weight)
    change = weight_of(SVD().spectrum(layer).factor(second["rank"]), getattr(layer, "groups", 1)) - layer.weight
    change = change.detach()
    assert second["predicted"] == pytest.approx(float((gradient * change).sum()), rel=1e-3, abs=1e-6)


def test_where_nothing_falls_the_model_stays_dense(net: nn.Sequential, batches: Any) -> None:
    flat = Objective(lambda logits, targets: logits.sum() * 0 + 1, {"calibration": batches})
    for verified in (False, True):
        compressed = Lossless(gamma=None, verified=verified, verify_on="calibration").compress(net, SVD(), flat)
        assert not compressed.plan and compressed.params_kept == 1 and compressed.report["rank"].isna().all()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"gamma": 0.0}, "gamma must be above 0"),
        ({"gamma": -1}, "gamma must be above 0"),
        ({"gamma": float("nan")}, "gamma must be above 0"),
        ({"norm": "spectral"}, "norm='spectral' is none of: "),
        ({"split": "test"}, "split='test' is none of: 'calibration', 'train'"),
        ({"order": "random"}, "order='random' is none of: 'network', "),
        ({"tries": 0}, "tries must be at least 1"),
        ({"verified_tolerance": -0.1}, "verified_tolerance must be at least 0"),
        ({"verified_tolerance": float("nan")}, "verified_tolerance must be at least 0"),
        ({"verified": "yes"}, "verified='yes' is not of type"),
    ],
)
def test_settings_that_cannot_be_are_refused(bad: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Lossless(**bad)


def test_verified_measures_on_the_verification_split_and_takes_its_gradient_elsewhere(
    net: nn.Sequential, objective: Objective
) -> None:
    settings = Lossless(gamma=None, verified=True)
    compressed = settings.compress(net, SVD(), objective)
    dense, after = (objective.evaluate(model, "verification").loss for model in (net, compressed.model))
    assert after <= dense
    accepted = [step["measured"] for step in compressed.log if step["accepted"]]
    assert accepted and sum(accepted) == pytest.approx(after - dense, abs=1e-6)
    with pytest.raises(UserError, match="^verification batches are missing"):
        settings.compress(net, SVD(), Objective(F.cross_entropy, {"calibration": objective.splits["calibration"]}))


class WithAuxiliary(nn.Module):
    """Runs a layer that its loss does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.auxiliary = nn.Linear(32, 64), nn.Linear(64, 10), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = torch.relu(self.body(x))
        return {"logits": self.head(features), "auxiliary": self.auxiliary(features)}


@pytest.mark.parametrize("refresh", [False, True])
@pytest.mark.parametrize("selector", [Lossless, Compact])
def test_a_layer_outside_of_the_loss_stays_dense_with_a_note(selector: Any, refresh: bool) -> None:
    batches = [(torch.randn(8, 32), torch.randint(10, (8,)))]
    objective = Objective(F.cross_entropy, {"calibration": batches})
    chosen = selector(gamma=None, verified=refresh, refresh=refresh, verify_on="calibration", verified_tolerance=1e9)
    result = chosen.compress(WithAuxiliary(), SVD(), objective)
    assert result.plan and "auxiliary" not in result.plan
    reason = "auxiliary: left dense: the calibration loss does not depend on it"
    assert any(note.startswith(reason) for note in result.notes)


class Routed(nn.Module):
    """Runs an expert as long as the last feature of ``body`` is not zero, which rank 1 makes it."""

    def __init__(self, order: str) -> None:
        super().__init__()
        sizes = {"body": (32, 16), "expert": (16, 16), "head": (16, 10)}
        for name in order.split():
            self.add_module(name, nn.Linear(*sizes[name], bias=False))
        with torch.no_grad():
            self.body.weight.copy_(torch.eye(16, 32) * torch.linspace(2, 1, 16).unsqueeze(1))

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        if float(features[:, -1].detach().abs().max()) > 1e-3:
            features = features + self.expert(features)
        return self.head(features)


@pytest.mark.parametrize("order", ["body expert head", "body head expert"])
def test_a_layer_that_the_loss_leaves_on_the_way_stays_dense_with_a_note(order: str) -> None:
    batches = [(torch.randn(8, 32), torch.randint(10, (8,)))]
    objective = Objective(F.cross_entropy, {"calibration": batches})
    walk = {"gamma": None, "verified": True, "refresh": True, "verify_on": "calibration", "verified_tolerance": 1e9}
    result = Compact(tolerance=1e9, **walk).compress(Routed(order), SVD(), objective)
    assert sorted(result.plan) == ["body", "head"] and result.plan["body"].rank == 1
    reason = "expert: left dense: the calibration loss does not depend on it"
    assert any(note.startswith(reason) for note in result.notes)


def test_missing_verification_batches_are_refused_before_anything_is_decomposed(
    net: nn.Sequential, batches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SVD, "spectrum", lambda *_: pytest.fail("decomposed"))
    with pytest.raises(UserError, match="verification"):
        Lossless(verified=True).compress(net, SVD(), Objective(F.cross_entropy, {"calibration": batches}))
