"""Models of transformers by name: a folder here, where a person with internet may give a name of the hub."""

import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import spectrim
from spectrim import language
from spectrim.checkpoints import single_file
from spectrim.errors import UserError
from spectrim.fetch import pretrained
from spectrim.losses import token_loss
from spectrim.models.language import causal_lm, classifier
from spectrim.statistics.objective import Objective
from spectrim.tools.safetensors_stream import Shard


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_folder_is_opened(tiny: Any, tmp_path: Path, kind: str) -> None:
    model = tiny(kind)
    model.save_pretrained(tmp_path)
    opened = causal_lm(str(tmp_path))
    assert not opened.training
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in opened.state_dict().items())


def test_a_classifier_gets_a_head_where_there_is_none(tiny: Any, tmp_path: Path, capsys: Any) -> None:
    tiny("bert").bert.save_pretrained(tmp_path)
    opened = classifier(str(tmp_path), num_classes=5)
    assert opened(input_ids=torch.ones(2, 3, dtype=torch.long)).logits.shape == (2, 5)
    captured = capsys.readouterr()
    assert "newly initialized" not in captured.out + captured.err


def test_a_head_of_other_classes_is_refused(tiny: Any, tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has a head of other than 5 classes"):
        classifier(str(tmp_path), num_classes=5)


def test_what_is_not_there_is_said_in_one_line(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be opened by transformers' AutoModelForCausalLM") as refusal:
        causal_lm(str(tmp_path / "nothing"))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("length", [0, 20, -100])
def test_an_interrupted_download_is_said_in_one_line(tiny: Any, tmp_path: Path, length: int) -> None:
    tiny("gpt2").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    with pytest.raises(
        UserError, match="a file of .* is cut short or no safetensors file .*; fetch it again"
    ) as refusal:
        causal_lm(str(tmp_path))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("kind", "opened"), [("llama", causal_lm), ("bert", partial(classifier, num_classes=3))])
def test_a_missing_shard_is_said_in_one_line_and_nothing_drawn_at_random(
    tiny: Any, tmp_path: Path, kind: str, opened: Any
) -> None:
    tiny(kind).save_pretrained(tmp_path, max_shard_size="10KB")
    index = tmp_path / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    second = sorted(set(whole["weight_map"].values()))[1]
    places = {tensor: file for tensor, file in whole["weight_map"].items() if file != second}
    index.write_text(json.dumps(whole | {"weight_map": places}))
    with pytest.raises(UserError, match="lacks .* parameters of its model, .* fetch both again") as refusal:
        opened(str(tmp_path))
    assert "\n" not in str(refusal.value)
    index.write_text(json.dumps(whole))
    (tmp_path / second).unlink()
    with pytest.raises(UserError, match=f"cannot be opened by .*{second}") as refusal:
        opened(str(tmp_path))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", ["nothing", "vit"])
def test_an_architecture_that_is_no_decoder_is_said_in_one_line(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UserError, match="cannot be opened by transformers' AutoModelForCausalLM") as refusal:
        causal_lm(str(tmp_path))
    assert "\n" not in str(refusal.value)


def test_a_missing_extra_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"needs extra packages .*pip install 'spectrim\[language\]'") as refusal:
        causal_lm("smollm2")
    assert "\n" not in str(refusal.value)


UNTIED = {"tie_word_embeddings": False}


@pytest.mark.parametrize(("kind", "changes"), [("gpt2", {}), ("llama", {}), ("llama", UNTIED)])
def test_a_compressed_model_is_saved_and_writes_the_same_text(
    tiny: Any, token_batches: Any, word_folder: Any, tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    objective, model = Objective(token_loss, {"calibration": token_batches}), tiny(kind, **changes)
    result = spectrim.Truncation(rank=4).compress(model, spectrim.SVD(embeddings=True), objective)
    embedding = "transformer.wte" if kind == "gpt2" else "model.embed_tokens"
    assert embedding in result.plan  # tied to the head or not
    tokenizer = pretrained.tokenizer(str(word_folder))
    language.save(tmp_path / "small", result.model, result.plan, tokenizer)
    assert not [path for path in (tmp_path / "small").iterdir() if path.suffix not in (".json", ".safetensors")]
    loaded, its_tokenizer = language.load(tmp_path / "small")
    prompt = its_tokenizer("w3 w4 w5", return_tensors="pt")
    written = [model.generate(**prompt, max_new_tokens=8, do_sample=False) for model in (result.model, loaded)]
    assert torch.equal(*written) and written[0].shape[1] > 3
    assert its_tokenizer.decode(written[0][0]) == tokenizer.decode(written[1][0])
    assert single_file.verified(tmp_path / "small" / "model.safetensors").metadata["plan"] == result.plan.to_json()
    assert language.perplexity(loaded, token_batches) == language.perplexity(result.model, token_batches)


def test_transformers_own_loader_reads_the_folder(tiny: Any, token_batches: Any, tmp_path: Path) -> None:
    objective = Objective(token_loss, {"calibration": token_batches})
    result = spectrim.Truncation(rank=4).compress(tiny("gpt2"), spectrim.SVD(), objective)
    language.save(tmp_path, result.model, result.plan)
    inputs, _ = token_batches[0]
    assert torch.equal(causal_lm(str(tmp_path))(**inputs).logits, result.model(**inputs).logits)
    assert language.load(tmp_path)[1] is None


def test_loading_reads_each_tensor_twice_to_verify_it_and_to_fill_the_model(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    language.save(tmp_path, tiny("gpt2"), spectrim.RankPlan())
    read, usual = Counter[str](), Shard.read
    monkeypatch.setattr(Shard, "read", lambda shard, name: read.update([name]) or usual(shard, name))
    language.load(tmp_path)
    assert read and set(read.values()) == {2}


def test_a_folder_that_names_something_else_is_refused(tiny: Any, tmp_path: Path) -> None:
    model = tiny("gpt2")
    single_file.save(tmp_path / "model.safetensors", model, spectrim.RankPlan(), {"class": "AutoModel"})
    with pytest.raises(UserError, match="names 'AutoModel', which is no model of transformers"):
        language.load(tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        language.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="a Linear is no model of transformers"):
        language.save(tmp_path, torch.nn.Linear(2, 2), spectrim.RankPlan())


class Elsewhere(torch.nn.Module):
    """A decoder on a device of its own, which notes where the ids are that it is given."""

    config = None

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.given = torch.nn.Linear(2, 2, device="meta"), dict[str, Any]()
        self.get_input_embeddings = lambda: self.layer

    def generate(self, **given: Any) -> Any:
        self.given = given
        return torch.zeros(1, 9, dtype=torch.int64)


def test_a_prompt_goes_to_the_device_of_the_model(word_folder: Any) -> None:
    model = Elsewhere()
    assert language.generate(model, pretrained.tokenizer(str(word_folder)), "w1 w2", 7)
    assert {model.given[name].device.type for name in ("input_ids", "attention_mask")} == {"meta"}


def test_a_prompt_that_nothing_can_follow_is_said_in_one_line(tiny: Any, word_folder: Any) -> None:
    tokenizer = pretrained.tokenizer(str(word_folder))
    assert language.generate(tiny("gpt2"), tokenizer, " ".join(30 * ["w1"]), 2)
    for prompt, message in [
        ("", "the prompt holds no token"),
        (" ".join(31 * ["w1"]), "31 tokens of prompt and 2 more exceed the 32 positions of the model"),
    ]:
        with pytest.raises(UserError, match=message) as refusal:
            language.generate(tiny("gpt2"), tokenizer, prompt, 2)
        assert "\n" not in str(refusal.value)
    tokenizer.add_tokens([f"more{n}" for n in range(20)])
    with pytest.raises(UserError, match="the tokenizer gives the id 7[0-9], the model knows 61 ids"):
        language.generate(tiny("gpt2"), tokenizer, "w1 more19", 2)
