"""Experts of transformers are unpacked where they compute the known formula, and left where they do not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import spectrim
from spectrim.fetch import pretrained
from spectrim.losses import token_loss
from spectrim.surgery import unpacking
from spectrim.surgery.lora import ADAPTED

pytest.importorskip("transformers")
SIZES: dict[str, Any] = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "intermediate_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
QWEN: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
KINDS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {**QWEN, "shared_expert_intermediate_size": 32},  # 5,632 by default
    "Qwen3Moe": {**QWEN, "head_dim": 12},
    "GptOss": {"num_local_experts": 4, "head_dim": 12},
}


def mixture(kind: str) -> Any:
    library: Any = pretrained.library()
    config = getattr(library, f"{kind}Config")(**SIZES, **KINDS[kind])
    model = getattr(library, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def experts_of(model: nn.Module) -> Any:
    return model.get_submodule("model.layers.0.mlp.experts")


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 61, (4, 9))


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_compressed_to_the_budget_and_load(kind: str, ids: torch.Tensor, tmp_path: Any) -> None:
    model = mixture(kind)
    unpacked = unpacking.unpacked(model)
    with torch.no_grad():
        torch.testing.assert_close(unpacked(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-3)
    assert sum(p.numel() for p in unpacked.parameters()) == sum(p.numel() for p in model.parameters())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    again = unpacking.pack(unpacked)
    assert type(experts_of(again)) is type(experts_of(model))
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    joint = spectrim.Joint(params_kept=0.7, samples=8, refit=8)
    result = spectrim.compress(model, calibration=[({"input_ids": ids}, ids)], loss=token_loss, algorithm=joint)
    assert result.params_kept <= 0.7 and any(".experts.gate_up." in name for name in result.plan)
    assert experts_of(result.model).gate_up_proj.shape == experts_of(model).gate_up_proj.shape
    spectrim.language.save(tmp_path, result.model, result.plan)
    loaded, _ = spectrim.language.load(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, result.model(ids).logits)


def scaled(experts: Any) -> Callable[..., Any]:
    """The forward of a class of experts that computes something else."""
    theirs = type(experts).forward
    return lambda self, *given: 2 * theirs(self, *given)


def fewer(experts: Any) -> Callable[..., Any]:
    """The forward of a class of experts that is called in another way."""
    theirs = type(experts).forward
    return lambda self, x, chosen: theirs(self, x, chosen, torch.ones_like(chosen))


@pytest.mark.parametrize(
    ("change", "reason"),
    [(scaled, "its experts compute another formula"), (fewer, "its experts are called in another way")],
)
def test_others_stay_with_the_reason(change: Any, reason: str) -> None:
    model = mixture("Mixtral")
    experts = experts_of(model)
    experts.__class__ = type("Other", (type(experts),), {"forward": change(experts)})
    assert unpacking.refusals(model) == {"model.layers.0.mlp.experts": reason}
    assert unpacking.unpacked(model) is model


def test_further_parameters_and_another_order_are_refused() -> None:
    model = mixture("Mixtral")
    experts = experts_of(model)
    experts.scale = nn.Parameter(torch.ones(1))
    assert "other parameters" in unpacking.refusals(model)["model.layers.0.mlp.experts"]
    del experts.scale
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.transpose(1, 2).contiguous())
    assert "another order" in unpacking.refusals(model)["model.layers.0.mlp.experts"]


class OfParameter(nn.Module):
    """As ``target_parameters`` of peft: it changes one parameter of the module inside while that is called."""

    def __init__(self, base: nn.Module, parameter_name: str) -> None:
        super().__init__()
        self.base_layer, self.parameter_name, self.merged = base, parameter_name, False

    def merge(self) -> None:
        self.merged = True

    def forward(self, *given: Any) -> Any:
        return self.base_layer(*given)


def test_those_that_an_adapter_changes_stay_packed_until_it_is_merged() -> None:
    model = mixture("Mixtral")
    block: Any = model.get_submodule("model.layers.0.mlp")
    block.experts = OfParameter(OfParameter(block.experts, "gate_up_proj"), "down_proj")
    inside = "model.layers.0.mlp.experts.base_layer.base_layer"
    assert unpacking.refusals(model) == {inside: ADAPTED}
    assert unpacking.unpacked(model) is model
    block.experts.merge()
    block.experts.base_layer.merge()
    assert not unpacking.refusals(model)


def test_the_trial_that_tells_the_formula_calls_no_hooks_of_the_user() -> None:
    model, seen = mixture("Mixtral"), list[Any]()
    experts_of(model).register_forward_hook(lambda _, given, __: seen.append(given))
    assert not unpacking.refusals(model) and not seen
