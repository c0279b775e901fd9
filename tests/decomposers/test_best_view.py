"""The better view is the one that loses less at equal cost, and is decomposed as it would be by itself."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim
from spectrim.batches import evaluating
from spectrim.decomposers.best_view import BestView, mean_loss
from spectrim.decomposers.spectrum import Spectrum, spectrum_of
from spectrim.decomposers.svd import SVD
from spectrim.decomposers.tucker2 import Tucker2
from spectrim.decomposers.whitened import WhitenedSVD
from spectrim.errors import UserError
from spectrim.factored.forms import PlainForm


def of_rank_one(view: str, groups: int = 1) -> nn.Conv2d:
    """A convolution that one component reproduces in this view, the cheaper one, and in this view alone."""
    outputs, inputs = (32, 4) if view == "channel" else (8, 8)
    layer = nn.Conv2d(groups * inputs, groups * outputs, 3, groups=groups).double()
    if view == "channel":
        second, first = torch.randn(groups, outputs, 1, 1, 1), torch.randn(groups, 1, inputs, 3, 3)
    else:
        second, first = torch.randn(groups, outputs, 1, 3, 1), torch.randn(groups, 1, inputs, 1, 3)
    with torch.no_grad():
        layer.weight.copy_((second * first).flatten(0, 1))
    return layer


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("view", ["channel", "spatial"])
def test_the_view_in_which_a_weight_has_low_rank_is_found(view: Any, groups: int) -> None:
    layer = of_rank_one(view, groups)
    spectrum = BestView(SVD()).spectrum(layer)
    assert spectrum.kept(1).form == PlainForm(view)
    assert torch.equal(spectrum.error(), SVD(view).spectrum(layer).error())
    assert spectrum.error()[1] < 1e-6 * spectrum.error()[0]


@pytest.mark.parametrize("decomposer", [SVD("channel"), SVD("spatial"), Tucker2()], ids=str)
@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3), nn.Conv2d(1, 9, (2, 3)), nn.Conv2d(4, 4, 3, groups=4)], ids=str)
def test_the_mean_loss_is_that_of_the_largest_rank_within_each_budget(decomposer: Any, layer: nn.Conv2d) -> None:
    spectrum: Spectrum = decomposer.spectrum(layer)
    params, losses = layer.weight.numel(), []
    for budget in range(params):
        rank = max(k for k in range(spectrum.max_rank + 1) if spectrum.cost(k) <= budget)
        losses.append(float(spectrum.relative_error()[rank].square()))
    assert mean_loss(spectrum, params) == pytest.approx(sum(losses) / params)


def moments_of(layer: nn.Conv2d, view: str) -> dict[str, Tensor]:
    """Moments under which one component carries all in this view, and inputs of the other are white."""
    sizes = {"channel": layer.weight[0].numel(), "spatial": layer.weight[0, :, 0].numel()}
    single = torch.ones(1, sizes[view], sizes[view]).double()
    return {form: single if form == view else torch.eye(size).double()[None] for form, size in sizes.items()}


@pytest.mark.parametrize("view", ["channel", "spatial"])
def test_the_inputs_decide_where_the_base_whitens(view: Any) -> None:
    layer = nn.Conv2d(8, 8, 3)
    moments = moments_of(layer, view)
    spectrum = BestView(WhitenedSVD()).spectrum(layer, moments)
    assert spectrum.kept(1).form == PlainForm(view)
    assert torch.equal(spectrum.weighted_error(), WhitenedSVD(view).spectrum(layer, moments).weighted_error())


def test_views_are_those_whose_moments_are_asked_for() -> None:
    linear, point, kernel = nn.Linear(4, 4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, (1, 3))
    whitened = BestView(WhitenedSVD(samples=7))
    assert [whitened.views(layer) for layer in (linear, point, kernel)] == [
        ("linear",),
        ("channel",),
        ("channel", "spatial"),
    ]
    assert whitened.samples == 7
    assert BestView().samples == 0 and BestView().views(kernel) == ()


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(6, 5, 1), nn.Conv2d(6, 5, (1, 3))], ids=str)
def test_what_looks_the_same_in_both_views_is_a_linear_or_in_the_channel_view(layer: Any) -> None:
    spectrum = BestView(SVD("spatial")).spectrum(layer)
    plain = SVD("channel").spectrum(layer)
    assert spectrum.kept(1).form == plain.kept(1).form and torch.equal(spectrum.error(), plain.error())


def test_a_zero_weight_has_nothing_to_lose() -> None:
    layer = nn.Conv2d(4, 4, 3)
    nn.init.zeros_(layer.weight)
    assert mean_loss(BestView().spectrum(layer), layer.weight.numel()) == 0


def test_it_is_remembered_apart_from_its_base() -> None:
    layer = of_rank_one("channel")
    assert spectrum_of(layer, BestView()) is spectrum_of(layer, BestView(SVD()))
    assert spectrum_of(layer, BestView()) is not spectrum_of(layer, SVD())


def test_another_base_is_refused() -> None:
    with pytest.raises(UserError, match="BestView: base=Tucker2"):
        BestView(Tucker2())  # type: ignore[arg-type]


@pytest.mark.parametrize("base", [SVD(), WhitenedSVD(samples=16)], ids=str)
@pytest.mark.parametrize("algorithm", [spectrim.Truncation(ratio=0.5), spectrim.Joint(params_kept=0.6, samples=16)])
def test_one_model_with_both_views_is_compressed_saved_and_loaded(
    base: Any, algorithm: Any, net: nn.Sequential, batches: Any, tmp_path: Path
) -> None:
    with torch.no_grad():
        net[0].weight.copy_(net[0].weight[:1] * torch.randn(12, 1, 1, 1))  # one component of the channel view
        net[3].weight.copy_(of_rank_one("spatial", groups=2).weight[:, :6])
    dense = copy.deepcopy(net)
    result = spectrim.compress(net, calibration=batches, algorithm=algorithm, decomposer=BestView(base))
    forms = {name: kept.form.to_text() for name, kept in result.plan.items()}
    assert forms and forms.items() <= {"0": "channel", "3": "spatial", "6": "linear", "8": "linear"}.items()
    result.save(tmp_path / "small.safetensors")
    loaded = spectrim.load(tmp_path / "small.safetensors", into=dense)
    with evaluating(loaded), evaluating(result.model), torch.no_grad():
        assert torch.equal(loaded(batches[0][0]), result.model(batches[0][0]))
