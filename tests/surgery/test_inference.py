"""A copy for inference predicts the same, without putting pivoted factors together in each pass."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim
from spectrim.batches import evaluating
from spectrim.decomposers.svd import SVD
from spectrim.factored.base import FactoredLayer
from spectrim.factored.completion import Completion
from spectrim.surgery.cost import parameters


def compressed(net: nn.Module, rank: Any, view: Any) -> nn.Module:
    plan = {name: rank for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    example = [torch.randn(4, 3, 8, 8)]
    return spectrim.compress(net, calibration=example, plan=plan, decomposer=SVD(view, factors="pivoted")).model


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with evaluating(model), torch.no_grad():
        return model(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("view", ["channel", "spatial"])
@pytest.mark.parametrize("rank", [1, 4])
def test_it_predicts_the_same_without_pivots(net: nn.Sequential, rank: int, view: str, dtype: torch.dtype) -> None:
    model = compressed(net, rank, view).to(dtype)
    before, x = copy.deepcopy(model.state_dict()), torch.randn(5, 3, 8, 8, dtype=dtype)
    fast = spectrim.for_inference(model)
    assert any(isinstance(module, Completion) for module in model.modules())
    assert not any(isinstance(module, Completion) for module in fast.modules())
    tolerance = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
    torch.testing.assert_close(outputs(fast, x), outputs(model, x), **tolerance)
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0)
    assert parameters(model) < parameters(fast) <= parameters(net)
    assert [module.training for module in fast.modules()] == [model.training] * len(list(fast.modules()))


def test_a_layer_becomes_dense_where_that_has_fewer_numbers(net: nn.Sequential) -> None:
    low, high = (
        spectrim.for_inference(spectrim.compress(net, plan={"6": rank}, decomposer=SVD(factors="pivoted")).model)
        for rank in (21, 22)
    )
    assert isinstance(low.get_submodule("6"), FactoredLayer)
    assert type(high.get_submodule("6")) is nn.Linear  # 22 (24 + 256) numbers are more than 24 * 256


def test_other_parameters_are_shared_and_what_is_put_together_takes_no_gradient(net: nn.Sequential) -> None:
    model = compressed(net, 1, "channel")
    fast = spectrim.for_inference(model)
    shared = {id(parameter) for parameter in model.parameters()}
    own = [name for name, parameter in fast.named_parameters() if id(parameter) not in shared]
    assert own and all(".second." in name for name in own)
    assert not any(fast.get_parameter(name).requires_grad for name in own)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_memory_format_is_kept(net: nn.Sequential) -> None:
    model = compressed(net, 2, "spatial").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(5, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    fast = spectrim.for_inference(model)
    torch.testing.assert_close(outputs(fast, x), outputs(model, x), atol=1e-5, rtol=1e-4)
    assert fast.get_parameter("3.second.weight").is_contiguous(memory_format=torch.channels_last)


def test_an_embedding_with_whole_rows_and_a_model_without_pivots_are_taken() -> None:
    model = nn.Sequential(nn.Embedding(60, 12), nn.Linear(12, 12))
    ids = [torch.randint(60, (8, 6))]
    decomposer = spectrim.WhitenedSVD(view="channel", embeddings=True, whole=0.3, factors="pivoted", samples=8)
    small = spectrim.compress(model, calibration=ids, plan={"0": 2, "1": 2}, decomposer=decomposer).model
    torch.testing.assert_close(outputs(spectrim.for_inference(small), ids[0]), outputs(small, ids[0]))
    torch.testing.assert_close(outputs(spectrim.for_inference(model), ids[0]), outputs(model, ids[0]), atol=0, rtol=0)


def test_what_is_no_eager_model_is_refused() -> None:
    with pytest.raises(spectrim.UserError, match="not a torch.nn.Module; pass the eager model"):
        spectrim.for_inference("model")  # type: ignore[arg-type]
