"""transformers saves and loads compressed models by itself, and never takes one for a dense model."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import spectrim
from spectrim import language
from spectrim.checkpoints import quantizer
from spectrim.factored.base import FactoredLayer
from spectrim.fetch import pretrained

SIZES = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
T5 = {"vocab_size": 61, "d_model": 24, "d_kv": 12, "d_ff": 40, "num_layers": 2, "num_heads": 2}


def made(kind: str) -> tuple[nn.Module, dict[str, Tensor], str]:
    """A model, its inputs, and the automatic class that opens it."""
    pytest.importorskip("transformers")
    library = pretrained.library()
    ids = torch.randint(3, 60, (3, 12))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "t5":
        model = library.T5ForConditionalGeneration(library.T5Config(**T5, decoder_start_token_id=0, pad_token_id=0))
        return model.eval(), {"input_ids": ids, "decoder_input_ids": ids}, "AutoModelForSeq2SeqLM"
    if kind == "mixtral":
        moe = {"intermediate_size": 40, "num_local_experts": 3, "num_key_value_heads": 1, "num_experts_per_tok": 2}
        return library.MixtralForCausalLM(library.MixtralConfig(**SIZES, **moe)).eval(), inputs, "AutoModelForCausalLM"
    if kind == "masked bert":
        return (
            library.BertForMaskedLM(library.BertConfig(**SIZES, intermediate_size=40)).eval(),
            inputs,
            "AutoModelForMaskedLM",
        )
    if kind == "bert":
        config = library.BertConfig(**SIZES, intermediate_size=40, num_labels=3)
        return library.BertForSequenceClassification(config).eval(), inputs, "AutoModelForSequenceClassification"
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 32}
    if kind == "gpt2":
        return library.GPT2LMHeadModel(library.GPT2Config(**SIZES, **special)).eval(), inputs, "AutoModelForCausalLM"
    ties = {"tie_word_embeddings": kind == "tied llama"}
    config = library.LlamaConfig(**SIZES, **special, intermediate_size=40, num_key_value_heads=1, **ties)
    return library.LlamaForCausalLM(config).eval(), inputs, "AutoModelForCausalLM"


def compressed(model: nn.Module, inputs: Any) -> Any:
    return spectrim.compress(model, calibration=[inputs], algorithm=spectrim.Truncation(ratio=0.5))


KINDS = ["llama", "gpt2", "mixtral", "bert", "t5"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by", ["save", "save_pretrained"])
def test_from_pretrained_and_load_give_the_same_model(kind: str, by: str, tmp_path: Path) -> None:
    model, inputs, auto = made(kind)
    result = compressed(model.bfloat16(), inputs)
    if by == "save":
        language.save(tmp_path, result.model, result.plan)
    else:
        result.model.save_pretrained(tmp_path)
    opened = getattr(pretrained.library(), auto).from_pretrained
    loaded, report = opened(tmp_path, output_loading_info=True)
    assert not any(report.values())
    again, _ = language.load(tmp_path)
    for one in (loaded, again):
        assert type(one) is type(model) and one.dtype == torch.bfloat16
        state = one.state_dict()
        assert state.keys() == result.model.state_dict().keys()
        assert all(torch.equal(value, state[name]) for name, value in result.model.state_dict().items())
        torch.testing.assert_close(one(**inputs).logits, result.model(**inputs).logits)
    assert sum(isinstance(module, FactoredLayer) for module in loaded.modules()) == len(result.plan)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_model_is_saved_again_and_cast(kind: str, tmp_path: Path) -> None:
    model, inputs, auto = made(kind)
    compressed(model, inputs).model.save_pretrained(tmp_path / "first")
    opened = getattr(pretrained.library(), auto).from_pretrained
    loaded = opened(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    again = opened(tmp_path / "second")
    assert torch.equal(again(**inputs).logits, loaded(**inputs).logits)
    assert copy.deepcopy(again).half().dtype == torch.float16


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_without_spectrim_it_is_refused(kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    model, inputs, auto = made(kind)
    compressed(model, inputs).model.save_pretrained(tmp_path)
    mappings = pretrained.imported("transformers.quantizers.auto")
    monkeypatch.delitem(mappings.AUTO_QUANTIZER_MAPPING, "spectrim")
    monkeypatch.delitem(mappings.AUTO_QUANTIZATION_CONFIG_MAPPING, "spectrim")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        getattr(pretrained.library(), auto).from_pretrained(tmp_path)


def test_the_body_of_a_model_with_a_head_is_read(tmp_path: Path) -> None:
    model, inputs, _ = made("bert")
    result = compressed(model, inputs)
    result.model.save_pretrained(tmp_path)
    body = pretrained.library().AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        found, expected = body(**inputs), result.model.get_submodule("bert")(**inputs)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)


def test_a_model_that_is_compressed_again_is_saved_by_its_last_plan(tmp_path: Path) -> None:
    model, inputs, auto = made("llama")
    first = compressed(model, inputs)
    second = spectrim.compress(first.model, calibration=[inputs], algorithm=spectrim.Truncation(rank=2))
    second.model.save_pretrained(tmp_path)
    loaded = getattr(pretrained.library(), auto).from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**inputs).logits, second.model(**inputs).logits)
    assert quantizer.plan_of(first.model.config) == first.plan and quantizer.plan_of(model.config) is None


def test_a_missing_factor_is_refused(tmp_path: Path) -> None:
    model, inputs, _ = made("llama")
    compressed(model, inputs).model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.first.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(spectrim.UserError, match="lacks model.layers.0.mlp.up_proj.first.weight"):
        language.load(tmp_path)


@pytest.mark.parametrize("by", ["save", "save_pretrained"])
@pytest.mark.parametrize(
    ("decomposer", "positions"),
    [
        (spectrim.SVD(view="channel", factors="pivoted"), "model.layers.0.mlp.up_proj.second.positions"),
        (spectrim.WhitenedSVD(view="channel", embeddings=True, whole=0.5), "model.embed_tokens.place"),
    ],
)
def test_positions_that_name_a_place_twice_are_refused(
    tmp_path: Path, decomposer: Any, positions: str, by: str
) -> None:
    model, inputs, auto = made("llama")
    algorithm = spectrim.Truncation(rank=4)
    result = spectrim.compress(model, calibration=[inputs], algorithm=algorithm, decomposer=decomposer)
    if by == "save":
        language.save(tmp_path, result.model, result.plan)
    else:
        result.model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    opened = getattr(pretrained.library(), auto).from_pretrained
    opened(tmp_path)
    tensors[positions][0] = tensors[positions][1]
    save_file(tensors, path, metadata)
    with pytest.raises(spectrim.UserError, match=f"^{tmp_path} is damaged: {positions}: it is no permutation"):
        opened(tmp_path)
    with pytest.raises(spectrim.UserError, match="is damaged|was altered"):
        language.load(tmp_path)


def changed_plan(folder: Path, change: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"]["plan"])
    path.write_text(json.dumps(config))


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda plan: plan.update({UP: {"rank": 10**9, "form": "linear"}}), "above the full rank"),
        (lambda plan: plan.update({UP: {"rank": 3, "form": "tucker 2x2"}}), "no factored form"),
        (lambda plan: plan.update({UP: "os.system"}), "needs a form"),
        (lambda plan: plan.clear() or plan.update(nothing={"rank": 1, "form": "linear"}), "none of the layers"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(tmp_path: Path, change: Any, said: str) -> None:
    model, inputs, auto = made("llama")
    compressed(model, inputs).model.save_pretrained(tmp_path)
    changed_plan(tmp_path, change)
    with pytest.raises(spectrim.UserError, match=said):
        getattr(pretrained.library(), auto).from_pretrained(tmp_path)


def test_a_dense_model_is_not_compressed_by_a_configuration(tmp_path: Path) -> None:
    model, inputs, auto = made("llama")
    config = compressed(model, inputs).model.config.quantization_config
    model.save_pretrained(tmp_path)
    with pytest.raises(spectrim.UserError, match="call spectrim.compress"):
        getattr(pretrained.library(), auto).from_pretrained(tmp_path, quantization_config=config)


def test_a_dense_folder_is_no_compressed_model(tmp_path: Path) -> None:
    model, _, _ = made("llama")
    model.save_pretrained(tmp_path)
    with pytest.raises(spectrim.UserError, match="config.json has no plan"):
        language.load(tmp_path)


def test_device_map_and_generate(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model, inputs, auto = made("llama")
    result = compressed(model, inputs)
    result.model.save_pretrained(tmp_path)
    loaded = getattr(pretrained.library(), auto).from_pretrained(tmp_path, device_map="cpu")
    settings = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(loaded.generate(**inputs, **settings), result.model.generate(**inputs, **settings))


@pytest.mark.parametrize("kind", ["tied llama", "gpt2", "t5", "masked bert"])
@pytest.mark.parametrize("factors", ["plain", "pivoted"])
def test_a_tied_embedding_is_stored_once_and_comes_back_tied(kind: str, factors: str, tmp_path: Path) -> None:
    model, inputs, auto = made(kind)
    decomposer = spectrim.WhitenedSVD(view="channel", embeddings=True, samples=3, whole=0.3, factors=factors)
    algorithm = spectrim.Truncation(params_kept=0.75)
    result = spectrim.compress(model, calibration=[inputs], algorithm=algorithm, decomposer=decomposer)
    plan, ties = result.plan, result.model.all_tied_weights_keys
    (first,) = (name for name, kept in plan.items() if "embedding" in kept.form.to_text())
    heads = {other.rpartition(".first.")[0] for other in ties if ".first." in other}
    assert heads and not heads & plan.keys() and first not in heads
    language.save(tmp_path / "ours", result.model, plan)
    result.model.save_pretrained(tmp_path / "theirs")
    stored = load_file(tmp_path / "theirs" / "model.safetensors")
    assert f"{first}.first.weight" in stored and not ties.keys() & stored.keys()
    with torch.no_grad():
        expected = result.model.eval()(**inputs).logits
    opener = getattr(pretrained.library(), auto)
    opened = opener.from_pretrained(tmp_path / "theirs")
    opened.save_pretrained(tmp_path / "again")
    for own in (language.load(tmp_path / "ours")[0], opened, opener.from_pretrained(tmp_path / "again")):
        own.tie_weights()  # which must find what it looks for
        for other, name in ties.items():
            assert own.get_parameter(other) is own.get_parameter(name)
        with torch.no_grad():
            assert torch.equal(own.eval()(**inputs).logits, expected)
    if kind != "masked bert":
        again = opened.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False)
        assert torch.equal(again, result.model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False))
    whole = type(model).from_pretrained  # a second compression names its factors anew
    twice = spectrim.compress(whole(tmp_path / "ours"), calibration=[inputs], plan={first: 2}, decomposer=decomposer)
    twice.model.save_pretrained(tmp_path / "twice")
    with torch.no_grad():
        assert torch.equal(whole(tmp_path / "twice").eval()(**inputs).logits, twice.model.eval()(**inputs).logits)


def test_a_head_that_was_untied_by_hand_is_not_saved_as_a_tied_one(tmp_path: Path) -> None:
    model, inputs, _ = made("tied llama")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    decomposer = spectrim.WhitenedSVD(view="channel", embeddings=True, samples=3)
    result = spectrim.compress(
        model, calibration=[inputs], algorithm=spectrim.Truncation(ratio=0.5), decomposer=decomposer
    )
    assert {"lm_head", "model.embed_tokens"} <= result.plan.keys()
    with pytest.raises(spectrim.UserError, match="set model.config.tie_word_embeddings=False"):
        result.model.save_pretrained(tmp_path)
    result.model.config.tie_word_embeddings = False
    result.model.save_pretrained(tmp_path)
    opened = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(opened.eval()(**inputs).logits, result.model.eval()(**inputs).logits)


def test_a_wrong_order_of_the_pivots_of_a_head_is_refused(tmp_path: Path) -> None:
    model, inputs, _ = made("gpt2")
    decomposer = spectrim.SVD(embeddings=True, factors="pivoted")
    result = spectrim.compress(
        model, calibration=[inputs], algorithm=spectrim.Truncation(ratio=0.5), decomposer=decomposer
    )
    result.model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.first.order"][1] = tensors["lm_head.first.order"][0]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(spectrim.UserError, match="lm_head.first.order: it is no permutation"):
        type(model).from_pretrained(tmp_path)
