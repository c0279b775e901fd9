"""What a plan makes of a model, and what a factored layer takes over from the dense one."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectrim.batches import evaluating
from spectrim.decomposers.spectrum import Spectrum, spectrum_of
from spectrim.decomposers.svd import SVD
from spectrim.errors import UserError
from spectrim.factored.forms import PlainForm
from spectrim.factored.plan import Kept, RankPlan
from spectrim.surgery import find_layers, replacing


def spectra_of(model: nn.Module, view: Any = "channel") -> dict[str, Spectrum]:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    return {name: spectrum_of(layer, SVD(view)) for name, layer in layers.items()}


def small(model: nn.Module, view: Any = "channel") -> tuple[nn.Module, RankPlan]:
    plan = RankPlan.of(
        {"0": Kept(3, PlainForm(view)), "3": Kept((0, 2), PlainForm(view)), "6": Kept(5, PlainForm("linear"))}
    )
    return replacing.apply(model, plan, spectra_of(model, view)), plan


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with evaluating(model), torch.no_grad():
        return model(x)


@pytest.mark.parametrize("gradients", [True, False])
def test_a_transformer_still_runs_after_its_layers_are_factored(gradients: bool) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.TransformerEncoderLayer(16, 2, 64, batch_first=True)).eval()
    x = torch.randn(4, 3, 16)
    layers, left = find_layers.factorable(model, x)
    plan = RankPlan.of({name: Kept(16, PlainForm("linear")) for name in layers})
    whole = replacing.apply(model, plan, {name: spectrum_of(layer, SVD()) for name, layer in layers.items()})
    assert "0" in plan and "1.self_attn.out_proj" in left
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(whole(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("view", ["channel", "spatial"])
def test_a_plan_is_applied_to_a_copy(net: nn.Sequential, view: str) -> None:
    before = copy.deepcopy(net.state_dict())
    compressed, plan = small(net, view)
    assert [compressed.get_submodule(name).rank for name in plan] == [3, 2, 5]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in compressed.parameters()}


def test_a_copy_that_only_looks_shares_what_it_does_not_replace(net: nn.Sequential) -> None:
    spectra, plan = spectra_of(net), RankPlan.of({"0": Kept(3, PlainForm("channel"))})
    apart, shared = (replacing.apply(net, plan, spectra, shared=own) for own in (False, True))
    own = {id(parameter) for parameter in net.parameters()}
    left = [p for name, p in shared.named_parameters() if not name.startswith("0.")]
    assert left and {id(p) for p in left} <= own and not {id(p) for p in apart.parameters()} & own
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(logits(shared, x), logits(apart, x)) and isinstance(net[0], nn.Conv2d)


def test_equal_plans_give_equal_models(net: nn.Sequential) -> None:
    (one, plan), (other, _) = small(net), small(copy.deepcopy(net))
    again = replacing.apply(net, RankPlan.from_json(plan.to_json()), spectra_of(net))
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]) and torch.equal(value, again.state_dict()[name])


def test_the_empty_plan_changes_nothing(net: nn.Sequential) -> None:
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(logits(replacing.apply(net, RankPlan(), {}), x), logits(net, x))


def test_a_replaced_layer_takes_the_mode_of_the_one_before(net: nn.Sequential) -> None:
    net[6].eval()
    compressed, _ = small(net)
    assert compressed[0].training and not compressed[6].training and not compressed[6].first.training


def test_a_plan_with_an_unknown_layer_is_refused(net: nn.Sequential) -> None:
    with pytest.raises(UserError, match="the plan names 'head'"):
        replacing.apply(net, RankPlan.of({"head": Kept(2, PlainForm("linear"))}), spectra_of(net))


class Scaled(nn.Linear):
    """A linear layer with a setting and a link to another module, which the model reads."""

    def __init__(self, link: nn.Module) -> None:
        super().__init__(8, 8)
        self.gain, self.link = 2.0, (link,)


class Linked(nn.Module):
    """Reads from its layer the module that the layer links to."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.body = Scaled(self.norm)

    def forward(self, x: Tensor) -> Tensor:
        (norm,) = self.body.link
        return norm(self.body.gain * self.body(x))


@pytest.mark.parametrize("rank", [1, 3])
def test_a_link_of_a_layer_leads_to_the_module_of_the_copy(rank: int) -> None:
    model = Linked().eval()
    spectra: Any = {"body": SVD().spectrum(model.body)}
    compressed = replacing.apply(model, RankPlan.of({"body": Kept(rank, PlainForm("linear"))}), spectra)
    assert compressed.body.gain == 2.0 and compressed.body.link[0] is compressed.norm is not model.norm
    x = torch.randn(4, 8)
    expected = model.norm(2 * (x @ compressed.body.weight.T + model.body.bias))
    torch.testing.assert_close(compressed(x), expected)


class Caught(nn.Module):
    """Keeps what a hook catches of its layer, as models that return the features of inner layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.body.register_forward_hook(self.catch)

    def catch(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        self.features = output

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.body(x)), self.features


def test_the_hooks_of_a_layer_go_on_working_on_the_copy() -> None:
    model = Caught()
    spectra: Any = {"body": SVD().spectrum(model.body)}
    compressed = replacing.apply(model, RankPlan.of({"body": Kept(2, PlainForm("linear"))}), spectra)
    x = torch.randn(4, 8)
    assert torch.equal(compressed(x)[1], compressed.body(x)) and not hasattr(model, "features")


def test_a_hook_can_still_be_removed_after_a_replacement_in_place() -> None:
    model, seen = nn.Sequential(nn.Linear(8, 8)), list[int]()
    handle = model[0].register_forward_hook(lambda *_: seen.append(1))
    replacing.replace(model, "0", SVD().spectrum(model[0]).factor(2))
    model(torch.randn(1, 8))
    handle.remove()
    model(torch.randn(1, 8))
    assert seen == [1]


@pytest.mark.parametrize(("weight", "bias"), [(True, True), (False, True), (True, False), (False, False)])
def test_what_is_frozen_stays_frozen(weight: bool, bias: bool) -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8))
    model[0].weight.requires_grad_(weight)
    model[0].bias.requires_grad_(bias)
    spectra: Any = {"0": SVD().spectrum(model[0])}
    compressed = replacing.apply(model, RankPlan.of({"0": Kept(2, PlainForm("linear"))}), spectra)
    replacing.replace(model, "0", spectra["0"].factor(3))
    replacing.replace(model, "0", spectra["0"].factor(2))  # a factored layer in the place of another
    for net in (compressed, model):
        (layer,) = net
        assert (layer.first.weight.requires_grad, layer.second.weight.requires_grad) == (weight, weight)
        assert layer.bias.requires_grad == bias and layer.in_features == 8


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("places", [1, 2])
def test_flags_of_a_tied_head_stay_in_the_model_and_in_the_copy(weight: bool, bias: bool, places: int) -> None:
    model: Any = nn.ModuleDict({"token": nn.Embedding(9, 6)})
    for place in range(places):
        model[f"head{place}"] = nn.Linear(6, 9)
        model[f"head{place}"].weight = model["token"].weight
        model[f"head{place}"].bias.requires_grad_(bias)
    model["token"].weight.requires_grad_(weight)
    spectrum = SVD(embeddings=True).spectrum(model["token"])
    copied = replacing.apply(model, RankPlan.of({"token": spectrum.kept(2)}), {"token": spectrum})
    assert [own.requires_grad for own in model.parameters()] == [weight, *[bias] * places]
    replacing.replace(model, "token", spectrum.factor(2))
    for net in (model, copied):
        for place in range(places):
            head = net[f"head{place}"]
            assert head.bias.requires_grad == bias and head.first.weight.requires_grad == weight
