"""Lemma 1 and Theorems 1 to 3 of S2: on random nets, ranks and inputs no bound is ever violated, and some are met."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spectrim.decomposers.spectrum import spectrum_of
from spectrim.decomposers.svd import SVD
from spectrim.errors import UserError
from spectrim.theory.bounds import LOSS_LIPSCHITZ, Stage, delta, output_bound, sensitivities
from spectrim.theory.chain import chain_of

many = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**31)
sides = st.integers(1, 7)
SLACK = 1 + 1e-9
STEEP = (nn.Identity, nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.ELU, nn.SELU, nn.Softsign, nn.Hardswish)
activations = st.sampled_from(STEEP)
scales = st.sampled_from([0.1, 1.0, 4.0])


@st.composite
def perceptrons(draw: st.DrawFn, bias: bool = False) -> nn.Sequential:
    """Linear layers of any width, depth 1 to 5, with or without biases, an activation behind each."""
    torch.manual_seed(draw(seeds))
    widths = draw(st.lists(sides, min_size=2, max_size=6))
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        linear = nn.Linear(before, after, bias=bias)
        linear.weight.data.mul_(draw(scales) * math.sqrt(before))
        layers += [linear, draw(activations)()]
    return nn.Sequential(*layers).double().requires_grad_(False)


@st.composite
def convolutional(draw: st.DrawFn) -> nn.Sequential:
    """Convolutions of every stride, zero padding, dilation and grouping, pooling, then a linear layer."""
    torch.manual_seed(draw(seeds))
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):
        pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
        kernel, stride, dilation = draw(pair), draw(st.tuples(st.integers(1, 2), st.integers(1, 2))), draw(pair)
        groups, padding = draw(st.sampled_from([1, 2])), (2 * dilation[0], 2 * dilation[1])
        conv = nn.Conv2d(4, 4, kernel, stride, padding, dilation, groups, bias=draw(st.booleans()))
        layers += [
            conv,
            draw(activations)(),
            draw(st.sampled_from([nn.Identity(), nn.MaxPool2d(2, 1), nn.AvgPool2d(2)])),
        ]
    model = nn.Sequential(*layers, nn.Flatten())
    features = model(torch.zeros(1, 4, 6, 5)).shape[1]
    return nn.Sequential(*model, nn.Linear(features, 3)).double().requires_grad_(False)


def images(model: nn.Sequential, seed: int, count: int = 12) -> Tensor:
    """Inputs small and large; of a perceptron also those that meet one singular component of its first layer alone."""
    first = next(module for module in model if isinstance(module, nn.Linear | nn.Conv2d))
    shape = (first.in_features,) if isinstance(first, nn.Linear) else (4, 6, 5)
    inputs = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    inputs *= torch.logspace(-2, 2, count, dtype=torch.float64).view(-1, *[1] * len(shape))
    if isinstance(first, nn.Linear):
        inputs = torch.cat([inputs, torch.linalg.svd(first.weight, full_matrices=False).Vh])
    return inputs


def truncated(model: nn.Sequential, ranks: Sequence[int | None], view: Any = "channel") -> nn.Sequential:
    """``model`` with its l-th layer cut to ``ranks[l]``."""
    left = iter(ranks)
    layers = []
    for module in model:
        rank = next(left) if isinstance(module, nn.Linear | nn.Conv2d) else None
        layers.append(module if rank is None else spectrum_of(module, SVD(view)).factor(rank))
    return nn.Sequential(*layers).eval()


def drawn_ranks(data: st.DataObject, stages: Sequence[Stage]) -> list[int | None]:
    return [data.draw(st.none() | st.integers(1, len(stage.S_R))) for stage in stages]


def moves(model: nn.Module, cut: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - cut(x)).flatten(1).norm(dim=1)


@many
@given(sides, sides, seeds, st.data())
def test_lemma_1_is_exact(outputs: int, inputs: int, seed: int, data: st.DataObject) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(inputs, outputs, bias=False).double().requires_grad_(False)
    spectrum = SVD().spectrum(layer)
    rank = data.draw(st.integers(1, spectrum.max_rank))
    factored = spectrum.factor(rank)
    norm = torch.linalg.matrix_norm(layer.weight - factored.second.weight @ factored.first.weight, ord=2)
    sigma = [*torch.linalg.svdvals(layer.weight).tolist(), 0.0]
    assert norm.item() == pytest.approx(sigma[rank], rel=1e-9, abs=1e-12)


@many
@given(perceptrons(), seeds, st.data())
def test_theorem_1_as_printed(model: nn.Sequential, seed: int, data: st.DataObject) -> None:
    stages = chain_of(model, SVD(), images(model, seed)).stages
    ranks = drawn_ranks(data, stages)
    x = images(model, seed)
    bounds = torch.tensor([output_bound(stages, ranks, norm) for norm in x.norm(dim=1).tolist()], dtype=torch.float64)
    assert (moves(model, truncated(model, ranks), x) <= bounds * SLACK + 1e-9).all()
    product = math.prod(stage.rho * float(stage.S_R[0]) for stage in stages)
    dropped = sum(
        float(torch.cat([stage.S_R, torch.zeros(1)])[len(stage.S_R) if rank is None else rank] / stage.S_R[0])
        for stage, rank in zip(stages, ranks, strict=True)
    )
    printed = product * dropped * x.norm(dim=1)
    torch.testing.assert_close(bounds, printed, rtol=1e-5, atol=1e-9, check_dtype=False)


@many
@given(perceptrons(bias=True), seeds, st.data())
def test_theorem_1_with_biases(model: nn.Sequential, seed: int, data: st.DataObject) -> None:
    x = images(model, seed)
    stages = chain_of(model, SVD(), x).stages
    ranks = drawn_ranks(data, stages)
    bounds = torch.tensor([output_bound(stages, ranks, norm) for norm in x.norm(dim=1).tolist()], dtype=torch.float64)
    assert (moves(model, truncated(model, ranks), x) <= bounds * SLACK + 1e-9).all()


@many
@given(convolutional(), st.sampled_from(["channel", "spatial"]), seeds, st.data())
def test_theorem_1_on_convolutions(model: nn.Sequential, view: Any, seed: int, data: st.DataObject) -> None:
    x = images(model, seed)
    stages = chain_of(model, SVD(view), x).stages
    ranks = drawn_ranks(data, stages)
    bounds = torch.tensor(
        [output_bound(stages, ranks, norm) for norm in x.flatten(1).norm(dim=1).tolist()], dtype=torch.float64
    )
    assert (moves(model, truncated(model, ranks, view), x) <= bounds * SLACK + 1e-9).all()


def test_theorem_1_is_reached_where_the_input_meets_what_is_dropped_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).double().requires_grad_(False)
    model[0].weight.copy_(torch.diag(torch.tensor([3.0, 2.0])))
    x = torch.tensor([[0.0, 5.0]], dtype=torch.float64)
    stages = chain_of(model, SVD(), x).stages
    assert moves(model, truncated(model, [1]), x).item() == pytest.approx(output_bound(stages, [1], 5.0)) == 10


def test_theorem_1_without_its_condition_on_biases_is_wrong() -> None:
    """S2 has no biases: a net with them breaks the printed bound and keeps ours, which counts them."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).double().requires_grad_(False)
    model[0].weight.copy_(0.1 * torch.eye(2))
    model[0].bias.copy_(torch.tensor([0.0, 10.0]))
    model[2].weight.copy_(torch.diag(torch.tensor([1.0, 0.9])))
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    stages = chain_of(model, SVD(), x).stages
    moved = moves(model, truncated(model, [None, 1]), x).item()
    printed = output_bound([stage._replace(bias=0.0) for stage in stages], [None, 1], 1.0)
    assert moved == pytest.approx(9) and printed == pytest.approx(0.09)
    assert moved <= output_bound(stages, [None, 1], 1.0)


def test_theorem_1_without_its_condition_that_0_goes_to_0_is_wrong() -> None:
    model = nn.Sequential(
        nn.Linear(1, 1, bias=False), nn.Sigmoid(), nn.Linear(1, 2, bias=False), nn.Linear(2, 2, bias=False)
    )
    model = model.double().requires_grad_(False)
    model[0].weight.fill_(0.01)
    model[2].weight.copy_(torch.tensor([[0.0], [4.0]]))
    model[3].weight.copy_(torch.diag(torch.tensor([1.0, 0.9])))
    x = torch.tensor([[1.0]], dtype=torch.float64)
    sigma = [torch.linalg.svdvals(layer.weight) for layer in (model[0], model[2], model[3])]
    stages = [Stage("layer", S_R, rho) for S_R, rho in zip(sigma, (0.25, 1.0, 1.0), strict=True)]
    assert moves(model, truncated(model, [None, None, 1]), x).item() > 100 * output_bound(stages, [None, None, 1], 1.0)
    with pytest.raises(UserError, match="Sigmoid does not map 0 to 0"):
        chain_of(model, SVD(), x)


def cut_at(stages: Sequence[Stage], threshold: float) -> list[int]:
    """The smallest ranks, at least 1, with sigma_{k+1} / sigma_1 < threshold: the most that the theorems allow."""
    return [max(1, int(stage.S_R.ge(threshold * stage.S_R[0]).sum())) for stage in stages]


@many
@given(st.booleans().flatmap(lambda bias: perceptrons(bias=bias)), seeds, st.sampled_from([1e-3, 0.1, 1.0, 100.0]))
def test_theorem_2_keeps_the_cross_entropy(model: nn.Sequential, seed: int, epsilon: float) -> None:
    x = images(model, seed)
    stages = chain_of(model, SVD(), x).stages
    threshold = delta(stages, epsilon, x.norm(dim=1).max().item(), "cross_entropy")
    cut = truncated(model, cut_at(stages, threshold))
    labels = torch.arange(len(x)) % model(x).shape[1]
    losses = [F.cross_entropy(net(x), labels, reduction="none") for net in (model, cut)]
    assert abs(losses[1].mean() - losses[0].mean()) < epsilon
    assert (losses[1] - losses[0]).abs().max() < epsilon


@many
@given(st.booleans().flatmap(lambda bias: perceptrons(bias=bias)), seeds, st.sampled_from([1e-3, 0.1, 1.0, 100.0]))
def test_theorem_3_keeps_the_distance(model: nn.Sequential, seed: int, epsilon: float) -> None:
    x = images(model, seed)
    stages = chain_of(model, SVD(), x).stages
    cut = truncated(model, cut_at(stages, delta(stages, epsilon, x.norm(dim=1).max().item(), "distance")))
    targets = torch.randn_like(model(x))
    losses = [(net(x) - targets).norm(dim=1) for net in (model, cut)]
    assert abs(losses[1].mean() - losses[0].mean()) < epsilon


@given(perceptrons(), st.sampled_from(["cross_entropy", "distance"]))
@settings(max_examples=20, deadline=None)
def test_without_biases_delta_is_as_printed(model: nn.Sequential, loss: Any) -> None:
    stages = chain_of(model, SVD(), images(model, 0)).stages
    product = math.prod(stage.rho * float(stage.S_R[0]) for stage in stages)
    printed = 0.3 / ({"cross_entropy": math.sqrt(2), "distance": 1}[loss] * 7 * len(stages) * product)
    assert delta(stages, 0.3, 7.0, loss) == pytest.approx(printed)


def test_the_constants_of_the_losses_are_the_smallest() -> None:
    sure = torch.tensor([[-30.0, 30.0]], dtype=torch.float64)  # certain of class 1, the label is class 0
    step = torch.tensor([[-1.0, 1.0]], dtype=torch.float64) * 1e-3
    label = torch.tensor([0])
    slope = (F.cross_entropy(sure + step, label) - F.cross_entropy(sure, label)) / step.norm()
    assert slope.item() == pytest.approx(LOSS_LIPSCHITZ["cross_entropy"]) == math.sqrt(2)
    assert (2 * step).norm() - step.norm() == pytest.approx(LOSS_LIPSCHITZ["distance"] * step.norm())


def test_a_dead_layer_grants_everything() -> None:
    stages = [Stage("a", torch.tensor([2.0, 1.0]), 1.0), Stage("b", torch.zeros(2), 1.0)]
    assert sensitivities(stages, 3.0) == [0, 0] and output_bound(stages, [1, 1], 3.0) == 0
    assert delta(stages, 0.1, 3.0, "cross_entropy") == math.inf


def test_what_cannot_be_asked_is_refused() -> None:
    stages = [Stage("a", torch.tensor([2.0, 1.0]), 1.0)]
    with pytest.raises(UserError, match="epsilon must be above 0, got 0.0"):
        delta(stages, 0.0, 1.0, "distance")
    with pytest.raises(UserError, match="a rank is at least 0"):
        output_bound(stages, [-1], 1.0)
