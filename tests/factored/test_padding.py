"""Pivoted linear layers pad the coefficients where many rows make that faster, and nobody else sees it."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from spectrim.decomposers.svd import SVD
from spectrim.factored.completion import MANY
from spectrim.surgery.cost import model_cost

RANK, OTHERS = 5, 14 - 5


def both(dtype: torch.dtype = torch.float32) -> list[Any]:
    """Return the plain and the pivoted layer of one rank."""
    dense = nn.Linear(8, 14).to(dtype)
    return [SVD(factors=own).spectrum(dense).factor(RANK) for own in ("plain", "pivoted")]


@pytest.fixture
def columns(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Yield the number of columns of each product."""
    found: list[int] = []
    linear = nn.functional.linear

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        found.append(len(weight))
        return linear(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", noted)
    yield found


@pytest.mark.parametrize("shape", [(MANY,), (2, MANY // 2), (MANY + 1,)])
def test_many_rows_are_padded_and_few_are_not(columns: list[int], shape: tuple[int, ...]) -> None:
    _, pivoted = both()
    pivoted(torch.randn(*shape, 8))
    pivoted(torch.randn(MANY - 1, 8))
    pivoted(torch.randn(0, 8))
    assert columns == [RANK, 16, RANK, OTHERS, RANK, OTHERS]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_products_that_are_no_faster_for_it_are_not_padded(columns: list[int], dtype: torch.dtype) -> None:
    _, pivoted = both(dtype)
    pivoted(torch.randn(MANY, 8, dtype=dtype))
    assert columns == [RANK, OTHERS]


def test_outputs_and_gradients_are_those_of_plain_factors() -> None:
    plain, pivoted = both()
    x = torch.randn(2, MANY, 8)
    found = []
    for layer in (plain, pivoted):
        given = x.clone().requires_grad_()
        y = layer(given)
        y.square().mean().backward()
        assert y.is_contiguous()
        found.append((y, given.grad, layer.bias.grad))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)
    few = torch.cat([pivoted(part) for part in x.split(MANY // 4, 1)], 1)
    torch.testing.assert_close(found[1][0], few)
    assert pivoted.second.others.weight.grad.shape == (OTHERS, RANK)


def test_macs_are_those_of_the_coefficients_alone() -> None:
    _, pivoted = both()
    with FlopCounterMode(display=False) as counter:
        pivoted(torch.randn(MANY, 8))
    assert counter.get_total_flops() == 2 * MANY * RANK * (8 + OTHERS)
    assert model_cost(pivoted, torch.randn(MANY, 8)).macs == RANK * (8 + OTHERS)


def test_a_hook_sees_the_coefficients_alone() -> None:
    _, pivoted = both()
    seen: list[torch.Size] = []
    pivoted.second.others.register_forward_hook(lambda _, __, output: seen.append(output.shape))
    pivoted(torch.randn(MANY, 8))
    assert seen == [(MANY, OTHERS)]


def test_a_layer_that_a_library_puts_in_place_is_called() -> None:
    _, pivoted = both()
    pivoted.second.others = nn.Sequential(pivoted.second.others, nn.Identity())
    pivoted.second.others.weight = pivoted.second.others[0].weight
    seen: list[torch.Size] = []
    pivoted.second.others[1].register_forward_hook(lambda _, __, output: seen.append(output.shape))
    pivoted(torch.randn(MANY, 8))
    assert seen == [(MANY, OTHERS)]


def test_samples_may_be_mapped_over_and_weights_too() -> None:
    _, pivoted = both()
    x = torch.randn(3, MANY, 8)
    torch.testing.assert_close(torch.func.vmap(pivoted)(x), pivoted(x))
    stacked = {name: torch.stack([own, 2 * own]) for name, own in pivoted.named_parameters()}
    buffers = dict(pivoted.named_buffers())

    def called(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(pivoted, (parameters, buffers), (x[0],))

    found = torch.func.vmap(called)(stacked)
    torch.testing.assert_close(found[0], pivoted(x[0]))


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_takes_any_number_of_rows(strict: bool) -> None:
    _, pivoted = both()
    rows = torch.export.Dim("rows", min=1)
    program = torch.export.export(pivoted, (torch.randn(MANY, 8),), dynamic_shapes=({0: rows},), strict=strict)
    for count in (3, 2 * MANY):
        x = torch.randn(count, 8)
        torch.testing.assert_close(program.module()(x), pivoted(x))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_traced_or_scripted_layer_takes_any_number_of_rows() -> None:
    _, pivoted = both()
    traced = torch.jit.trace(pivoted, torch.randn(MANY, 8))
    scripted = torch.jit.script(pivoted)
    for count in (3, 2 * MANY):
        x = torch.randn(count, 8)
        torch.testing.assert_close(traced(x), pivoted(x))
        torch.testing.assert_close(scripted(x), pivoted(x))
    assert not [node for node in traced.inlined_graph.nodes() if "pad" in node.kind()]
