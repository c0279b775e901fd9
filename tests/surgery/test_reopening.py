"""A factored layer is made dense again with the same map, and says what a plan would say of it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import spectrim
from spectrim.batches import evaluating
from spectrim.decomposers.subspaces import SubspaceSVD
from spectrim.decomposers.svd import SVD
from spectrim.decomposers.tucker2 import Tucker2
from spectrim.errors import UserError
from spectrim.export.plain import plain_model
from spectrim.factored.plan import RankPlan
from spectrim.surgery import replacing
from spectrim.surgery.find_layers import factorable
from spectrim.surgery.inference import for_inference
from spectrim.surgery.reopening import factored_layers, kept_in, reopened

DECOMPOSERS: Any = [SVD("channel"), SVD("spatial"), SubspaceSVD(2, "channel"), SubspaceSVD(2, "spatial"), Tucker2()]


def factored(
    net: nn.Module, decomposer: Any, names: tuple[str, ...] = ("0", "3", "6", "8"), rank: int = 3
) -> tuple[Any, RankPlan]:
    spectra = {name: decomposer.spectrum(net.get_submodule(name)) for name in names}
    plan = RankPlan.of({name: spectrum.kept(rank) for name, spectrum in spectra.items()})
    return replacing.apply(net, plan, spectra), plan


@pytest.mark.parametrize("decomposer", DECOMPOSERS, ids=str)
def test_what_is_opened_computes_the_same(decomposer: Any, net: nn.Sequential, batches: Any) -> None:
    compressed, plan = factored(net, decomposer)
    before = copy.deepcopy(compressed.state_dict())
    opened = reopened(compressed)
    assert [type(module) for module in opened] == [type(module) for module in net]
    assert list(factorable(opened, batches[0][0])[0]) == ["0", "3", "6", "8"]
    x = batches[0][0]
    with evaluating(opened), evaluating(compressed), torch.no_grad():
        torch.testing.assert_close(opened(x), compressed(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in compressed.state_dict().items())
    assert factored_layers(compressed).keys() == plan.keys() and not factored_layers(opened)


@pytest.mark.parametrize("decomposer", DECOMPOSERS, ids=str)
def test_a_factored_layer_names_its_rank_and_form(decomposer: Any, net: nn.Sequential) -> None:
    compressed, plan = factored(net, decomposer)
    assert {name: kept_in(layer) for name, layer in factored_layers(compressed).items()} == dict(plan)


def test_an_embedding_is_opened_too() -> None:
    layer = nn.Embedding(30, 12)
    model = nn.Sequential(layer)
    compressed, plan = factored(model, SVD(embeddings=True), ("0",))
    opened = reopened(compressed)
    ids = torch.arange(30)
    assert type(opened[0]) is nn.Embedding
    torch.testing.assert_close(opened(ids), compressed(ids))
    assert kept_in(compressed[0]) == plan["0"]


def test_frozen_weights_stay_frozen_and_the_rest_is_shared(net: nn.Sequential) -> None:
    net[6].weight.requires_grad_(False)
    net[6].bias.requires_grad_(False)
    compressed, _ = factored(net, SVD(), ("6", "8"))
    opened = reopened(compressed)
    assert not opened[6].weight.requires_grad and not opened[6].bias.requires_grad and opened[8].weight.requires_grad
    assert opened[0].weight is compressed[0].weight and opened[8].bias is not compressed[8].bias


def test_a_model_without_factored_layers_is_itself(net: nn.Sequential) -> None:
    assert reopened(net) is net


class Scaled(nn.Module):
    """A layer that holds a module outside of it in an attribute, and one that reads it in a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.body = nn.Dropout(0.0), nn.Sequential(nn.Linear(8, 8))
        self.body[0].register_forward_hook(Reader(self.gain))
        self.body[0].aside = [self.gain]  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Reader:
    def __init__(self, gain: nn.Module) -> None:
        self.gain = gain

    def __call__(self, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * (1 + self.gain.p)


@pytest.mark.parametrize("made", [reopened, for_inference, plain_model])
def test_what_a_layer_of_the_copy_leads_to_is_in_the_copy(made: Any) -> None:
    decomposer = SVD(factors="pivoted")
    compressed, _ = factored(Scaled(), decomposer, ("body.0",), rank=7)  # for inference a dense layer is smaller
    copied = made(compressed)
    (layer,), (given,) = copied.body, compressed.body
    assert type(layer) is nn.Linear
    (hook,) = layer._forward_hooks.values()
    assert hook.gain is copied.gain and layer.aside[0] is copied.gain
    layer.register_forward_hook(lambda *_: None)
    assert len(given._forward_hooks) == 1 and given.aside[0] is compressed.gain


def test_what_needs_the_product_of_quantised_factors_is_refused_in_one_line(net: nn.Sequential, tmp_path: Path) -> None:
    """The weights that torchao quantises are tensors of another class, which cannot be multiplied out."""
    pivoted = SVD(factors="pivoted")
    result = spectrim.compress(net, algorithm=spectrim.Truncation(ratio=0.5), decomposer=pivoted)
    others: Any = next(iter(factored_layers(result.model).values())).second.others
    others.weight = nn.Parameter(TwoTensor(others.weight.detach(), others.weight.detach()))
    calls: list[Any] = [
        lambda: spectrim.for_inference(result.model),
        lambda: spectrim.compress(result.model, algorithm=spectrim.Truncation(ratio=0.3)),
        lambda: result.export("plain", tmp_path / "small_net"),
        lambda: result.save(tmp_path / "small.safetensors"),
    ]
    for call in calls:
        with pytest.raises(UserError, match="class TwoTensor.* before it is quantised$|before they are quantised$"):
            call()
    assert not list(tmp_path.iterdir())
