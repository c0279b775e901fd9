"""A checkpoint with the names of its file on the hub is read as transformers reads the dense one."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import spectrim
from spectrim import language
from spectrim.checkpoints import sharded
from spectrim.factored.base import FactoredLayer
from spectrim.fetch import pretrained
from spectrim.tools import digests, safetensors_stream

UNUSED = {
    "gpt2": [],
    "mixtral": [],
    "deepseek": [],
    "bert": [", ".join(f"bert.pooler.dense.{part}" for part in ("first.weight", "second.bias", "second.weight"))],
}
SIZES = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def as_on_the_hub(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Write a folder as the hub has it. Return the class of the model."""
    transformers = pretrained.library()
    if kind == "gpt2":  # without the prefix "transformer.", and with the mask that is no parameter any more
        special = {"bos_token_id": 1, "eos_token_id": 2}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES, **special, max_position_embeddings=32))
        state = {name.removeprefix("transformer."): value for name, value in model.state_dict().items()}
        del state["lm_head.weight"]
        state["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    elif kind == "mixtral":  # experts one by one, which the model has in one tensor
        settings = {"intermediate_size": 40, "num_local_experts": 3, "num_key_value_heads": 1, "num_experts_per_tok": 2}
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, **settings))
        model.save_pretrained(folder)
        state = load_file(folder / "model.safetensors")
    elif kind == "deepseek":  # the same, and a router with a bias beside its weight
        ranks = {"q_lora_rank": 12, "kv_lora_rank": 12, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
        heads = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 2}
        experts = {"moe_intermediate_size": 16, "n_routed_experts": 6, "num_experts_per_tok": 2}
        settings = {"intermediate_size": 40, **ranks, **heads, **experts}
        model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**SIZES, **settings))
        model.save_pretrained(folder)
        state = load_file(folder / "model.safetensors")
    else:  # BERT with the pooler of its pretraining, LayerNorm by its old names
        config = transformers.BertConfig(**SIZES, intermediate_size=40, num_labels=2)
        model = transformers.BertForQuestionAnswering(config)
        state = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
            for name, value in model.state_dict().items()
        }
        state |= {"bert.pooler.dense.weight": torch.randn(24, 24), "bert.pooler.dense.bias": torch.ones(24)}
    torch.manual_seed(1)
    state = {name: (value + 0.2 * torch.randn_like(value)).to(dtype) for name, value in state.items()}
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    safetensors_stream.save(folder / "model.safetensors", state, {"format": "pt"})
    return type(model)


def multiplied(small: Path, dense: Path, to: Path) -> Path:
    """Write the dense checkpoint whose factors ``small`` holds, with the configuration of ``dense``."""
    stored, plan = load_file(small / "model.safetensors"), sharded.Manifest.read(small).plan
    transposed = json.loads((dense / "config.json").read_text())["model_type"] == "gpt2"
    for layer in plan:
        product = stored.pop(f"{layer}.first.weight")
        if f"{layer}.second.weight" in stored:
            product = stored.pop(f"{layer}.second.weight") @ product
        else:
            whole = torch.cat([product, stored.pop(f"{layer}.second.others.weight") @ product])
            product = whole[stored.pop(f"{layer}.second.positions")]
        stored[f"{layer}.weight"] = product.T.contiguous() if transposed else product
        if f"{layer}.second.bias" in stored:
            stored[f"{layer}.bias"] = stored.pop(f"{layer}.second.bias")
    safetensors_stream.save(to / "model.safetensors", stored, {"format": "pt"})
    (to / "config.json").write_bytes((dense / "config.json").read_bytes())
    return to


def output(model: Any) -> Tensor:
    with torch.no_grad():
        found = model.eval()(input_ids=torch.arange(3, 15).reshape(2, 6))
    return found.logits if "logits" in found else found.start_logits


@pytest.fixture(params=list(UNUSED))
def kind(request: pytest.FixtureRequest) -> str:
    pytest.importorskip("transformers")
    return request.param


@pytest.mark.parametrize("factors", ["plain", "pivoted"])
def test_it_is_the_model_that_transformers_reads_from_the_products(
    kind: str, factors: Any, tmp_path: Path, caplog: Any
) -> None:
    dense, small = tmp_path / "dense", tmp_path / "small"
    model_class = as_on_the_hub(kind, dense)
    plan = spectrim.compress_checkpoint(dense, small, ratio=0.5, factors=factors)
    expected = model_class.from_pretrained(multiplied(small, dense, tmp_path / "products"))
    with caplog.at_level(logging.WARNING, "spectrim"):
        loaded, _ = language.load(small)
    assert type(loaded) is model_class
    torch.testing.assert_close(output(loaded), output(expected), atol=1e-5, rtol=1e-4)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("spectrim")]
    unused = UNUSED[kind]
    if factors == "pivoted":
        parts = "dense.second.others.weight, bert.pooler.dense.second.positions"
        unused = [names.replace("dense.second.weight", parts) for names in unused]
    assert said == [f"{model_class.__name__} has no use for {names} in {small}" for names in unused]
    factored = {name for name, module in loaded.named_modules() if isinstance(module, FactoredLayer)}
    prefix = "transformer." if kind == "gpt2" else ""
    parts_of_others = "block_sparse_moe", "pooler", "mlp.experts.", "mlp.gate."
    merged = {layer for layer in plan if any(part in f"{layer}." for part in parts_of_others)}
    assert factored == {prefix + layer for layer in plan.keys() - merged} and len(factored) >= 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_stay_sixteen_bits(kind: str, tmp_path: Path, dtype: torch.dtype) -> None:
    dense = as_on_the_hub(kind, tmp_path / "dense", dtype).from_pretrained(tmp_path / "dense", dtype=dtype)
    spectrim.compress_checkpoint(tmp_path / "dense", tmp_path / "small", ratio=0.5)
    loaded, _ = language.load(tmp_path / "small")
    # A router has 32 bits in transformers, too.
    assert {own.dtype for own in loaded.parameters()} == {own.dtype for own in dense.parameters()} >= {dtype}
    assert not any(value.is_meta for value in [*loaded.parameters(), *loaded.buffers()])


def rewritten(folder: Path, change: Any) -> None:
    """Change the tensors of a compressed checkpoint, and its digest with them."""
    path, manifest = folder / "model.safetensors", folder / "spectrim.json"
    tensors = load_file(path)
    change(tensors)
    safetensors_stream.save(path, tensors, {"format": "pt"})
    plain = json.loads(manifest.read_text())
    plain["shards"][path.name]["result"] = digests.of_file(path)
    manifest.write_text(json.dumps(plain))


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("gpt2", lambda state: state.pop("h.0.ln_1.weight"), "it lacks transformer.h.0.ln_1.weight"),
        ("gpt2", lambda state: state.pop("h.1.attn.c_attn.first.weight"), "it lacks transformer.h.1.attn.c_attn.first"),
        (
            "mixtral",
            lambda state: state.pop("model.layers.0.block_sparse_moe.experts.1.w2.first.weight"),
            "the checkpoint lacks model.layers.0.block_sparse_moe.experts.1.w2.first.weight",
        ),
        (
            "mixtral",
            lambda state: state.update(
                {
                    f"model.layers.0.block_sparse_moe.experts.1.w2.{part}.weight": torch.ones(shape)
                    for part, shape in (("first", (1, 10**5)), ("second.others", (10**5, 1)))
                }
            ),
            "make up a weight that is larger than the model takes",
        ),
        (
            "mixtral",
            lambda state: state["model.layers.0.block_sparse_moe.experts.1.w2.second.positions"].fill_(1),
            "the positions of the pivots of model.layers.0.block_sparse_moe.experts.1.w2 are no permutation",
        ),
        (
            "mixtral",
            lambda state: state.update(
                {"model.layers.0.block_sparse_moe.experts.1.w2.first.weight": torch.ones(1, 40)}
            ),
            "the factors of model.layers.0.block_sparse_moe.experts.1.w2 do not fit one another",
        ),
        (
            "mixtral",
            lambda state: [state.pop(name) for name in list(state) if "layers.1.block_sparse_moe.experts.2" in name],
            "do not make up|it lacks|another architecture",
        ),
    ],
)
def test_what_is_missing_or_too_large_is_said_in_one_line(kind: str, change: Any, message: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    as_on_the_hub(kind, tmp_path / "dense")
    spectrim.compress_checkpoint(tmp_path / "dense", tmp_path / "small", ratio=0.5)
    rewritten(tmp_path / "small", change)
    with pytest.raises(spectrim.UserError, match=message) as refusal:
        language.load(tmp_path / "small")
    assert "\n" not in str(refusal.value)
