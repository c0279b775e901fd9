"""Adapters of peft take factored layers by the names of the dense ones, train, and merge exactly."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spectrim
from spectrim import language
from spectrim.factored.layers import FactoredLinear
from spectrim.language import for_lora
from spectrim.surgery.lora import narrow, widen

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an older name
NAMES = {"llama": ["q_proj", "up_proj"], "gpt2": ["c_attn"], "bert": ["query"]}


def adapted(tiny: Any, token_batches: Any, kind: str) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """A compressed model, the same with an adapter that changes its outputs, and inputs."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    inputs, _ = token_batches[0]
    truncation = spectrim.Truncation(rank=4)
    model = spectrim.compress(tiny(kind), calibration=[inputs], algorithm=truncation).model
    config = for_lora(peft.LoraConfig(target_modules=NAMES[kind], r=3, fan_in_fan_out=kind == "gpt2"))
    with_adapter = peft.get_peft_model(copy.deepcopy(model), config)
    for name, parameter in with_adapter.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model, with_adapter.eval(), inputs


@pytest.mark.parametrize("kind", sorted(NAMES))
def test_only_the_adapter_is_trained(tiny: Any, token_batches: Any, kind: str) -> None:
    model, with_adapter, inputs = adapted(tiny, token_batches, kind)
    trainable = [name for name, parameter in with_adapter.named_parameters() if parameter.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)
    with_adapter(**inputs).logits.square().sum().backward()
    moved = [name for name, parameter in with_adapter.named_parameters() if parameter.grad is not None]
    assert moved == trainable
    assert not torch.allclose(with_adapter(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("kind", sorted(NAMES))
def test_merging_is_exact_and_the_merged_model_is_saved(
    tiny: Any, token_batches: Any, kind: str, tmp_path: Path
) -> None:
    model, with_adapter, inputs = adapted(tiny, token_batches, kind)
    expected = with_adapter(**inputs).logits
    with_adapter.merge_adapter()
    torch.testing.assert_close(with_adapter(**inputs).logits, expected, atol=1e-5, rtol=1e-4)
    with_adapter.unmerge_adapter()
    torch.testing.assert_close(with_adapter(**inputs).logits, expected, atol=1e-5, rtol=1e-4)
    merged = with_adapter.merge_and_unload()
    assert type(merged) is type(model)
    torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-5, rtol=1e-4)
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**inputs).logits, expected, atol=1e-5, rtol=1e-4)
    assert {layer.rank for layer in loaded.modules() if isinstance(layer, FactoredLinear)} == {4, 7}


def test_a_plan_that_an_adapter_made_untrue_is_not_saved(tiny: Any, token_batches: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    inputs, _ = token_batches[0]
    result = spectrim.compress(tiny("llama"), calibration=[inputs], algorithm=spectrim.Truncation(rank=4))
    adapted = peft.get_peft_model(result.model, for_lora(peft.LoraConfig(target_modules=["q_proj"], r=3)))
    name = "model.layers.0.self_attn.q_proj"
    with pytest.raises(spectrim.UserError, match=f"^the model has no factored layer {name}; .*without an adapter$"):
        result.save(tmp_path / "small.safetensors")
    merged = adapted.merge_and_unload()
    for save in (lambda: result.save(tmp_path / "a"), lambda: language.save(tmp_path, merged, result.plan)):
        with pytest.raises(spectrim.UserError, match=f"^layer {name} has rank 7, the plan says 4; .*save_pretrained$"):
            save()
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_saved_and_read_onto_the_compressed_model(tiny: Any, token_batches: Any, tmp_path: Path) -> None:
    model, with_adapter, inputs = adapted(tiny, token_batches, "llama")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    with_adapter.save_pretrained(tmp_path)
    config = for_lora(peft.LoraConfig.from_pretrained(tmp_path))
    again = peft.PeftModel.from_pretrained(model, tmp_path, config=config)
    torch.testing.assert_close(again(**inputs).logits, with_adapter(**inputs).logits)


def test_an_adapter_above_full_rank_is_refused() -> None:
    layer = FactoredLinear(6, 8, 4)
    with pytest.raises(spectrim.UserError, match="rank 3 does not fit .* full rank 6"):
        widen(layer, torch.randn(3, 6), torch.randn(8, 3))


def test_what_was_added_is_taken_away() -> None:
    layer = FactoredLinear(6, 8, 4)
    A, B, before = torch.randn(2, 6), torch.randn(8, 2), layer.weight
    widen(layer, A, B)
    torch.testing.assert_close(layer.weight, before + B @ A)
    narrow(layer, 2)
    assert torch.equal(layer.weight, before)
