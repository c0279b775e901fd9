"""Layers that share one weight with an embedding are found by it, and replaced together."""

import pytest
from torch import nn

from spectrim.factored.forms import EmbeddingForm, PlainForm
from spectrim.factored.layers import FactoredEmbedding
from spectrim.factored.tied import TiedLinear
from spectrim.surgery import replacing, tied

IDS, WIDTH = 20, 6


def model(*kinds: type[nn.Module]) -> nn.Sequential:
    """Layers that all have the weight of the first one."""
    layers = nn.Sequential(*(kind(*((WIDTH, IDS) if kind is nn.Linear else (IDS, WIDTH))) for kind in kinds))
    for layer in layers:
        layer.weight = layers[0].weight
    return layers


def test_they_are_named_by_the_first_embedding_wherever_it_is() -> None:
    assert tied.tied_layers(model(nn.Embedding, nn.Linear)) == {"0": ("1",)}
    assert tied.tied_layers(model(nn.Linear, nn.Linear, nn.Embedding, nn.Embedding)) == {"2": ("0", "1", "3")}
    assert tied.tied_layers(model(nn.Linear, nn.Linear)) == {}
    assert tied.tied_layers(nn.Sequential(nn.Embedding(IDS, WIDTH), nn.Linear(WIDTH, IDS))) == {}


@pytest.mark.parametrize("form", [EmbeddingForm(), EmbeddingForm(3), EmbeddingForm(0, True), EmbeddingForm(3, True)])
def test_one_replacement_and_its_undoing_reach_all_of_them(form: EmbeddingForm) -> None:
    net = model(nn.Linear, nn.Embedding, nn.Embedding)
    bias, dense = net[0].bias, net[1]
    before = tied.tied_layers(net)
    undo = replacing.replace(net, "1", form.layer_for(dense, 2))
    assert [type(layer) for layer in net] == [TiedLinear, FactoredEmbedding, FactoredEmbedding]
    assert tied.tied_layers(net) == before == {"1": ("0", "2")}  # and none of the layers inside
    assert net[0].bias is bias and net[2].first.weight is net[1].first.weight
    undo()
    assert net[1] is dense and [type(layer) for layer in net] == [nn.Linear, nn.Embedding, nn.Embedding]
    assert net[0].weight is net[1].weight is net[2].weight and net[0].bias is bias
    assert tied.notes(net, ["1"]) == dict.fromkeys(["0", "2"], "its rank is that of 1, whose weight it shares")
    assert tied.notes(net, []) == {}


def test_a_layer_that_shares_nothing_is_replaced_alone() -> None:
    net = nn.Sequential(nn.Embedding(IDS, WIDTH), nn.Linear(WIDTH, IDS))
    layer = PlainForm("linear").layer_for(net[1], 2)
    assert tied.places(net, "1", layer) == {"1": layer}
