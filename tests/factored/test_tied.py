"""A head with the factors of an embedding multiplies by them as by their product, and takes their gradients."""

import copy

import pytest
import torch
from torch import Tensor, nn

from spectrim.factored.forms import EmbeddingForm
from spectrim.factored.tied import TiedLinear, counterpart

IDS, WIDTH, RANK = 20, 6, 3
FORMS = [EmbeddingForm(), EmbeddingForm(4), EmbeddingForm(0, True), EmbeddingForm(4, True)]


@pytest.fixture(params=FORMS, ids=str)
def pair(request: pytest.FixtureRequest) -> nn.ModuleList:
    """An embedding with random factors and its head."""
    form = request.param
    embedding = form.layer_for(nn.Embedding(IDS, WIDTH), RANK)
    rows = IDS - form.whole_rows
    with torch.no_grad():
        embedding.fill_matrices(torch.randn(1, WIDTH, RANK), torch.randn(1, RANK, rows))
        if form.whole_rows:
            embedding.whole.weight.normal_()
            embedding.place.copy_(torch.randperm(IDS))
    return nn.ModuleList([embedding, counterpart(embedding, nn.Linear(WIDTH, IDS))])


def rows_of(embedding: nn.Module) -> Tensor:
    return embedding(torch.arange(IDS))


def test_the_head_multiplies_by_the_rows_of_the_embedding(pair: nn.ModuleList) -> None:
    embedding, head = pair
    assert isinstance(head, TiedLinear) and head.pivoted == embedding.pivoted
    x = torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(head.weight, rows_of(embedding))
    torch.testing.assert_close(head(x), x @ rows_of(embedding).T + head.bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(x).dtype == torch.bfloat16
    torch.testing.assert_close(head.dense_again()(x), head(x))
    assert sum(p.numel() for p in pair.parameters()) == sum(p.numel() for p in embedding.parameters()) + IDS


def test_its_gradient_is_that_of_the_product(pair: nn.ModuleList) -> None:
    embedding, head = pair
    x, weights = torch.randn(7, WIDTH), torch.randn(7, IDS)
    ours = torch.autograd.grad((head(x) * weights).sum(), list(embedding.parameters()))
    plain = torch.autograd.grad(((x @ rows_of(embedding).T) * weights).sum(), list(embedding.parameters()))
    torch.testing.assert_close(ours, plain)


def test_a_copy_of_both_shares_among_itself(pair: nn.ModuleList) -> None:
    embedding, head = copy.deepcopy(pair)
    assert head.second.weight is embedding.first.weight is not pair[0].first.weight
    twin = counterpart(pair[0], nn.Embedding(IDS, WIDTH))
    assert [id(p) for p in twin.parameters()] == [id(p) for p in pair[0].parameters()]
    torch.testing.assert_close(rows_of(twin), rows_of(pair[0]))
