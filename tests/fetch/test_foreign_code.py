"""A folder of a model may bring code of its own. Nothing of it is run, even where a person's stdin says "y"."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spectrim.errors import UserError
from spectrim.fetch import by_configuration, pretrained
from spectrim.models.language import answerer, causal_lm, classifier

pytest.importorskip("transformers")
CODE = """
from pathlib import Path
Path(r"{mark}").touch()
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizer
class Config(PretrainedConfig):
    model_type = "foreign"
class Model(PreTrainedModel):
    config_class = Config
class Tokenizer(PreTrainedTokenizer):
    pass
"""
MODELS = ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModelForQuestionAnswering")
USES: dict[str, Callable[[str], Any]] = {
    "a configuration": lambda folder: pretrained.opened("AutoConfig", folder),
    "a tokenizer": pretrained.tokenizer,
    "a decoder": causal_lm,
    "a classifier": classifier,
    "an answerer": answerer,
    "a compressed folder": lambda folder: by_configuration.model_without_weights(Path(folder), None, torch.float32),
}


@pytest.mark.parametrize("use", USES)
def test_code_beside_a_model_is_not_run(use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark, folder = tmp_path / "was-run", tmp_path / "foreign"
    folder.mkdir()
    (folder / "code.py").write_text(CODE.format(mark=mark))
    classes = {"AutoConfig": "code.Config", **dict.fromkeys(MODELS, "code.Model")}
    (folder / "config.json").write_text(json.dumps({"model_type": "foreign", "auto_map": classes}))
    tokenizer = {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError):
        USES[use](str(folder))
    assert not mark.exists()
