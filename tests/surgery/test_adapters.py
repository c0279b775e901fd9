"""A model that has adapters, as those of peft, is compressed around them: what would be lost is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import spectrim
from spectrim.surgery.lora import ADAPTED


class Adapter(nn.Module):
    """``x -> W x + A x``, with the methods by which peft merges A into W."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.merged = base, False
        self.A = nn.Parameter(torch.randn(base.out_features, base.in_features))

    def merge(self) -> None:
        self.base_layer.weight.data += self.A.data
        self.merged = True

    def unmerge(self) -> None:
        self.base_layer.weight.data -= self.A.data
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) if self.merged else self.base_layer(x) + x @ self.A.T


class Plus(nn.Module):
    def __init__(self, change: Tensor) -> None:
        super().__init__()
        self.change = change

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.change


class OfParameter(nn.Module):
    """An adapter that changes one parameter while its layer is called, as ``target_parameters`` of peft."""

    def __init__(self, base: nn.Module, parameter_name: str) -> None:
        super().__init__()
        self.base_layer, self.parameter_name, self.merged = base, parameter_name, False
        self.change = nn.Parameter(torch.randn_like(base.get_parameter(parameter_name)))

    def merge(self) -> None:
        self.base_layer.get_parameter(self.parameter_name).data += self.change.data
        self.merged = True

    def forward(self, *given: Any) -> Any:
        parametrize.register_parametrization(self.base_layer, self.parameter_name, Plus(self.change), unsafe=True)
        try:
            return self.base_layer(*given)
        finally:
            parametrize.remove_parametrizations(self.base_layer, self.parameter_name, leave_parametrized=False)


@pytest.fixture
def adapted() -> nn.Sequential:
    return nn.Sequential(Adapter(nn.Linear(12, 16)), nn.ReLU(), nn.Linear(16, 12)).eval()


@pytest.mark.parametrize("is_merged", [False, True])
def test_an_adapter_is_not_merged_into_a_product_that_nobody_keeps(
    adapted: Any, is_merged: bool, tmp_path: Path
) -> None:
    x, dense = torch.randn(5, 12), copy.deepcopy(adapted)
    if is_merged:
        adapted[0].merge()
    result = spectrim.compress(adapted, calibration=[x], plan={"0.base_layer": 3})
    result.save(tmp_path / "small.safetensors")
    for model in (result.model, spectrim.load(tmp_path / "small.safetensors", into=copy.deepcopy(adapted))):
        with torch.no_grad():
            before = model(x)
            for method in ("merge", "unmerge"):
                with pytest.raises(spectrim.UserError, match="merge it before compress"):
                    getattr(model.get_submodule("0"), method)()
            torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    adapted[0].unmerge() if is_merged else adapted[0].merge()  # the given model is free
    torch.testing.assert_close(adapted(x), dense(x))


def test_an_adapter_merges_into_a_layer_that_stays_dense(adapted: Any) -> None:
    x = torch.randn(5, 12)
    model: Any = spectrim.compress(adapted, calibration=[x], plan={"2": 3}).model
    before = model(x)
    model[0].merge()
    torch.testing.assert_close(model(x), before)


def test_a_layer_whose_parameter_an_adapter_changes_stays_dense_until_it_is_merged() -> None:
    x, wrapped = torch.randn(5, 12), OfParameter(nn.Linear(12, 16), "weight")
    model: Any = nn.Sequential(wrapped, nn.ReLU(), nn.Linear(16, 12)).eval()
    for given in ({"calibration": [x]}, {}):
        result = spectrim.compress(model, algorithm=spectrim.Truncation(rank=3), **given)
        assert list(result.plan) == ["2"]
        assert any(note.startswith(f"0.base_layer: left dense: {ADAPTED}") for note in result.notes)
        result.model(x)
