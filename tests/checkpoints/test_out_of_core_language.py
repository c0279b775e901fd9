"""Checkpoints of transformers compressed from folder to folder: Conv1D layers, configuration and tokenizer, text."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import spectrim
from spectrim import language
from spectrim.checkpoints import sharded
from spectrim.errors import UserError
from spectrim.factored.forms import PlainForm
from spectrim.factored.plan import Kept
from spectrim.fetch import pretrained
from spectrim.losses import token_loss
from spectrim.models.language import causal_lm
from spectrim.statistics.objective import Objective


@pytest.fixture(params=["gpt2", "llama"])
def dense(request: pytest.FixtureRequest, tiny: Any, word_folder: Path) -> tuple[Any, Path]:
    """A model and the folder that it is saved in, with a tokenizer."""
    model = tiny(request.param)
    model.save_pretrained(word_folder)
    return model, word_folder


@pytest.mark.parametrize("factors", ["plain", "pivoted"])
def test_it_is_the_model_cut_in_memory_and_comes_with_all_it_needs(
    dense: Any, token_batches: Any, tmp_path: Path, factors: Any
) -> None:
    model, folder = dense
    out = tmp_path / "small"
    plan = spectrim.compress_checkpoint(folder, out, ratio=0.5, factors=factors)
    objective = Objective(token_loss, {"calibration": token_batches})
    expected = spectrim.Truncation(ratio=0.5).compress(model, spectrim.SVD(factors=factors), objective)
    assert plan == expected.plan and len(plan) >= 8
    loaded, tokenizer = language.load(out)
    inputs = objective.example()
    torch.testing.assert_close(loaded(**inputs).logits, expected.model(**inputs).logits, atol=1e-4, rtol=1e-3)
    assert {path.name for path in (out / sharded.BESIDE).iterdir()} >= {"config.json", "tokenizer.json"}
    assert language.generate(loaded, tokenizer, "w3 w4", 5) == language.generate(expected.model, tokenizer, "w3 w4", 5)
    with pytest.raises(UserError, match="cannot be opened"):  # nor is it taken for a dense model
        causal_lm(str(out))


@pytest.mark.parametrize("way", ["save", "compress_checkpoint"])
@pytest.mark.parametrize("templates", ["{{ messages }}", {"default": "{{ messages }}", "rag": "{{ documents }}"}])
def test_a_chat_model_keeps_its_chat_templates(dense: Any, tmp_path: Path, way: str, templates: Any) -> None:
    model, folder = dense
    out = tmp_path / "small"
    words = pretrained.library().AutoTokenizer.from_pretrained(folder)
    words.chat_template = templates
    if way == "save":
        small = spectrim.compress(model, algorithm=spectrim.Truncation(ratio=0.5), loss=token_loss)
        language.save(out, small.model, small.plan, words)
    else:
        words.save_pretrained(folder)
        spectrim.compress_checkpoint(folder, out, ratio=0.5)
    assert language.load(out)[1].chat_template == templates


def test_only_the_configuration_tells_how_a_weight_is_stored(tiny: Any, tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path / "dense")
    plan = spectrim.RankPlan.of({"transformer.h.0.mlp.c_fc": Kept(2, PlainForm("linear"))})
    for name, given in (("config", {}), ("said", {"transposed": ("*c_fc",)}), ("not", {"transposed": ()})):
        spectrim.compress_checkpoint(tmp_path / "dense", tmp_path / name, plan=plan, **given)
    shapes = {
        name: sharded.Sharded.at(tmp_path / name).entries["transformer.h.0.mlp.c_fc.first.weight"].shape
        for name in ("config", "said", "not")
    }
    assert shapes == {"config": (2, 24), "said": (2, 24), "not": (2, 96)}
    (tmp_path / "dense" / "config.json").write_text("[")
    with pytest.raises(UserError, match=r"config.json is no configuration of a model .*; fetch it again") as refusal:
        spectrim.compress_checkpoint(tmp_path / "dense", tmp_path / "other", plan=plan)
    assert "\n" not in str(refusal.value) and not (tmp_path / "other").exists()


def test_what_cannot_be_loaded_without_a_model_is_said_in_one_line(dense: Any, tmp_path: Path) -> None:
    _, folder = dense
    out = tmp_path / "small"
    spectrim.compress_checkpoint(folder, out, ratio=0.5)
    config = out / sharded.BESIDE / "config.json"
    whole = json.loads(config.read_text())

    def refuses(message: str) -> None:
        with pytest.raises(UserError, match=message) as refusal:
            language.load(out)
        assert "\n" not in str(refusal.value)

    for named, said in ((["AutoModel"], "'AutoModel'"), ([5], "5"), (5, "5"), ("no_such_class", "'no_such_class'")):
        config.write_text(json.dumps(whole | {"architectures": named}))
        refuses(f"names {said}, which is no model of transformers")
    for change in ({"hidden_size": -4, "n_embd": -4}, {"num_attention_heads": 7, "n_head": 7}):
        config.write_text(json.dumps(whole | change))
        refuses("that can be built|cannot be opened by")
    config.write_text(json.dumps({"model_type": "vit"}))
    refuses("names no class of transformers under architectures, nor is it that of a decoder")
    config.write_text(json.dumps({"model_type": "opt", "num_hidden_layers": 1, "hidden_size": 24}))
    refuses("is of another architecture")
    config.unlink()
    refuses(r"holds no config.json; build the model yourself")


def test_a_configuration_that_names_no_class_is_that_of_a_decoder(dense: Any, tmp_path: Path) -> None:
    model, folder = dense
    config = folder / "config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "architectures"}))
    spectrim.compress_checkpoint(folder, tmp_path / "small", ratio=0.5)
    assert type(language.load(tmp_path / "small")[0]) is type(model)
