"""Adapters of peft: low-rank ones on factored linear layers, and those that a model had before it was compressed."""

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from spectrim.errors import UserError
from spectrim.factored.base import FactoredLayer
from spectrim.factored.layers import FactoredLinear
from spectrim.factored.unpacked.base import Unpacked

ADAPTED = "an adapter changes its parameters in each pass"


def for_lora(config: Any) -> Any:
    """Return a ``peft.LoraConfig`` that also takes factored linear layers among its ``target_modules``.

    ``get_peft_model(result.model, for_lora(LoraConfig(target_modules=["q_proj"])))`` adapts a compressed model. To
    read an adapter: ``PeftModel.from_pretrained(model, folder, config=for_lora(LoraConfig.from_pretrained(folder)))``.
    Merging is exact: it adds the rank of the adapter to that of the layer.

    Raises ``UserError`` where peft is not installed.
    """
    config._register_custom_module({FactoredLinear: adapted_class()})
    return config


@cache
def adapted_class() -> Any:
    """Return the class of a factored linear layer with an adapter, whose base is that of peft.

    Raises ``UserError`` where peft is not installed.
    """
    try:
        lora: Any = import_module("peft.tuners.lora.layer")
        utils: Any = import_module("peft.tuners.tuners_utils")
    except ImportError as error:
        raise UserError(f"adapters need peft ({error}): pip install peft") from None

    class AdaptedLinear(lora.Linear):
        """``x -> B A x + s B' A' x``: a factored linear layer and an adapter of peft beside it."""

        merges_into_factors = True

        def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
            assert isinstance(module, FactoredLinear)
            return module.in_features, module.out_features

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            for name in utils.check_adapters_to_merge(self, adapter_names):
                if name in self.lora_A:
                    A, B = self.lora_A[name], self.lora_B[name]
                    if name in self.lora_variant or B.bias is not None:
                        raise UserError("only a plain LoRA without bias merges with a factored layer; keep it beside")
                    widen(self.get_base_layer(), A.weight, self.scaling[name] * B.weight)
                    self.merged_adapters.append(name)

        def unmerge(self) -> None:
            while self.merged_adapters:
                narrow(self.get_base_layer(), self.lora_A[self.merged_adapters.pop()].weight.shape[0])

    return AdaptedLinear


@torch.no_grad()
def widen(layer: FactoredLinear, A_RI: Tensor, B_OR: Tensor) -> None:
    """Add ``B A`` to the weight of ``layer``, by components of its own.

    Raises ``UserError`` where the rank would exceed the full rank of the layer.
    """
    rank, full = layer.rank + len(A_RI), min(layer.in_features, layer.out_features)
    if rank > full or not (isinstance(layer.first, nn.Linear) and isinstance(layer.second, nn.Linear)):
        raise UserError(
            f"an adapter of rank {len(A_RI)} does not fit into a layer of rank {layer.rank} with full rank {full} "
            "or with pivoted factors or subspaces; keep the adapter beside it"
        )
    first, second = layer.first.weight, layer.second.weight
    _set(layer, torch.cat([first, A_RI.to(first)]), torch.cat([second, B_OR.to(second)], 1))


@torch.no_grad()
def narrow(layer: FactoredLinear, rank: int) -> None:
    """Remove the last ``rank`` components of ``layer``."""
    _set(layer, layer.first.weight[:-rank].clone(), layer.second.weight[:, :-rank].clone())


def _set(layer: FactoredLinear, A_RI: Tensor, B_OR: Tensor) -> None:
    assert isinstance(layer.first, nn.Linear) and isinstance(layer.second, nn.Linear)
    layer.first.weight = nn.Parameter(A_RI, layer.first.weight.requires_grad)
    layer.second.weight = nn.Parameter(B_OR, layer.second.weight.requires_grad)
    layer.rank = layer.first.out_features = layer.second.in_features = len(A_RI)


def adapted_parameters(model: nn.Module) -> set[str]:
    """Return the modules of ``model`` whose parameters an adapter replaces in each pass (``target_parameters``)."""
    return {base for base, adapter in _adapters(model) if hasattr(adapter, "parameter_name") and not _merged(adapter)}


def refuse_merges(model: nn.Module) -> None:
    """Let adapters refuse to be merged into layers that were factored under them, or out of these.

    They would write to the weight that such a layer offers, a product that is computed anew at each access. So the
    change would be lost. An adapter from ``for_lora`` merges into the factors, unless it is merged already.
    """
    for base, adapter in _adapters(model):
        lost = isinstance(model.get_submodule(base), FactoredLayer | Unpacked)
        own = getattr(adapter, "merges_into_factors", False) and not _merged(adapter)
        for method in ("merge", "unmerge"):
            if lost and not own:
                vars(adapter)[method] = _refused
            elif vars(adapter).get(method) is _refused:  # the layer is dense again
                del vars(adapter)[method]


def _adapters(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield each adapter of peft with the name of the layer inside of it, which further adapters may lie around."""
    for name, module in model.named_modules():
        base, place = module, name
        while (inside := dict(base.named_children()).get("base_layer")) is not None:
            base, place = inside, f"{place}.base_layer" if place else "base_layer"
        if base is not module and hasattr(type(module), "merge"):
            yield place, module


def _merged(adapter: Any) -> bool:
    return bool(getattr(adapter, "merged", False))


def _refused(*_: Any, **__: Any) -> NoReturn:
    raise UserError(
        "an adapter cannot be merged into a layer that was factored under it, or out of it; merge it before compress, "
        "or keep it beside the layer"
    )
