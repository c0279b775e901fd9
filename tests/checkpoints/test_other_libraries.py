"""Compressed models of transformers go through the Trainer, and through the integers of torchao."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spectrim
from spectrim import language
from spectrim.factored.base import FactoredLayer
from spectrim.fetch import pretrained


def compressed(model: nn.Module, token_batches: Any) -> Any:
    return spectrim.compress(model, calibration=token_batches, algorithm=spectrim.Truncation(rank=4))


@pytest.mark.parametrize("opened", [False, True], ids=["as compressed", "as opened"])
def test_the_trainer_trains_and_saves_it(tiny: Any, token_batches: Any, tmp_path: Path, opened: bool) -> None:
    pytest.importorskip("accelerate")
    library = pretrained.library()
    model: Any = compressed(tiny("llama"), token_batches).model
    if opened:
        model.save_pretrained(tmp_path / "small")
        model = type(model).from_pretrained(tmp_path / "small")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs, _ = token_batches[0]
    samples = [{"input_ids": ids, "labels": ids} for ids in inputs["input_ids"]]
    arguments = library.TrainingArguments(
        str(tmp_path / "run"), max_steps=2, learning_rate=0.1, use_cpu=True, report_to="none", disable_tqdm=True
    )
    trainer = library.Trainer(model=model, args=arguments, train_dataset=samples)
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    changed = [name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])]
    assert any(name.endswith("first.weight") for name in changed)
    loaded = type(model).from_pretrained(tmp_path / "trained")
    torch.testing.assert_close(loaded(**inputs).logits, trainer.model.eval()(**inputs).logits)
    assert any(isinstance(module, FactoredLayer) for module in loaded.modules())


def int8(model: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    quantized = copy.deepcopy(model)
    quantization.quantize_(quantized, quantization.Int8WeightOnlyConfig())
    return quantized


def test_int8_after_loading_is_int8_before_saving(tiny: Any, token_batches: Any, tmp_path: Path) -> None:
    result = compressed(tiny("llama"), token_batches)
    quantized = int8(result.model)
    inputs, _ = token_batches[0]
    found, exact = quantized(**inputs).logits, result.model(**inputs).logits
    assert 0 < (found - exact).abs().max() < 0.05 * exact.abs().max()
    language.save(tmp_path, result.model, result.plan)
    loaded, _ = language.load(tmp_path)
    assert torch.equal(int8(loaded)(**inputs).logits, found)


def test_integers_are_not_written_as_if_they_were_numbers_of_the_model(
    tiny: Any, token_batches: Any, tmp_path: Path
) -> None:
    result = compressed(tiny("llama"), token_batches)
    quantized = int8(result.model)
    for write in (
        lambda: language.save(tmp_path, quantized, result.plan),
        lambda: quantized.save_pretrained(tmp_path),
    ):
        with pytest.raises(spectrim.UserError, match="Int8Tensor.*save the model before it is quantised"):
            write()
    assert not list(tmp_path.glob("*.safetensors"))
