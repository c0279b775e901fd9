"""An unpacked module computes what the packed one does, offers what it offers, and can be packed again."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectrim.factored.dense import dense_kinds
from spectrim.factored.forms import PlainForm
from spectrim.factored.unpacked.base import Unpacked
from spectrim.surgery import replacing, unpacking

# Torch itself warns of kernels that are slow or new.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:LSTM with projections"),
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
]
Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def tensors(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    if hasattr(outputs, "batch_sizes"):
        return [outputs.data]
    return [] if outputs is None else [tensor for part in outputs for tensor in tensors(part)]


def assert_same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(tensors(ours), tensors(theirs), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("graded", [True, False])
def test_it_computes_the_same(case: Case, training: bool, graded: bool) -> None:
    module, args, kwargs = case
    module.train(training)
    with torch.set_grad_enabled(graded):
        unpacked = unpacking.unpacked(module)
        assert unpacked is not module
        assert_same(unpacked(*args, **kwargs), module(*args, **kwargs))


def test_every_matrix_is_a_layer_that_can_be_factored_and_the_parameters_are_as_many(case: Case) -> None:
    module, _, _ = case
    unpacked = unpacking.unpacked(module)
    for part in unpacked.modules():
        own = list(part.parameters(recurse=False))
        assert isinstance(part, dense_kinds()) or all(parameter.ndim < 2 for parameter in own)
    assert sum(p.numel() for p in unpacked.parameters()) == sum(p.numel() for p in module.parameters())


def test_packed_again_it_is_the_same_module_with_the_same_numbers(case: Case) -> None:
    module, args, kwargs = case
    for parameter in list(module.parameters())[:1]:
        parameter.requires_grad_(False)
    before = copy.deepcopy(module)
    again = unpacking.pack(unpacking.unpacked(module))
    assert type(again) is type(module)
    names = [name for name, _ in before.named_parameters()]
    assert [name for name, _ in again.named_parameters()] == names
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in again.state_dict().items())
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in before.parameters()]
    assert_same(again(*args, **kwargs), before(*args, **kwargs))
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in module.state_dict().items())
    assert {name for name in vars(again)} == {name for name in vars(before)}


def test_what_the_module_offered_is_offered_still(case: Case) -> None:
    module, _, _ = case
    unpacked = unpacking.unpacked(module)
    for name, part in module.named_modules():
        own = unpacked.get_submodule(name)
        assert isinstance(own, type(part)) and own.training == part.training
        for attribute in vars(part).keys() - {"_parameters", "_modules"}:
            if not attribute.startswith("_flat_"):
                assert type(getattr(own, attribute)) is type(getattr(part, attribute))
        for parameter, value in part.named_parameters(recurse=False):
            assert torch.equal(getattr(own, parameter), value)


def test_with_a_factored_layer_it_stays_unpacked_and_reads_as_the_product(case: Case) -> None:
    module, args, kwargs = case
    model = unpacking.unpacked(module)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    name, layer = next(iter(layers.items()))
    form = PlainForm("channel" if isinstance(layer, nn.Conv2d) else "linear")
    factored = form.layer_for(layer, 1)
    nn.init.ones_(factored.first.weight)
    nn.init.ones_(factored.second.weight)
    if factored.bias is not None:
        nn.init.zeros_(factored.bias)
    replacing.replace(model, name, factored)
    unpacking.pack(model)
    assert model.get_submodule(name) is layer and type(layer) is type(factored)
    around = [module for module in model.modules() if isinstance(module, Unpacked)]
    assert around and all(any(one is layer for one in module.modules()) for module in around)
    outputs = model(*args, **kwargs)
    replacing.replace(model, name, factored.dense_again())
    assert_same(unpacking.pack(model)(*args, **kwargs), outputs)


def test_moved_and_copied_it_still_runs(case: Case) -> None:
    module, args, kwargs = case
    unpacked = unpacking.unpacked(module)
    expected = unpacked(*args, **kwargs)
    assert_same(copy.deepcopy(unpacked).double().float()(*args, **kwargs), expected)
