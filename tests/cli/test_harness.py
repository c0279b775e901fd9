"""lm-evaluation-harness measures a compressed model by the name ``spectrim``."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import spectrim
from spectrim import language
from spectrim.fetch import pretrained


def test_it_gives_the_likelihoods_of_the_model(word_folder: Path, token_batches: Any, tmp_path: Path) -> None:
    pretrained.library()
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    decoder = pretrained.library().AutoModelForCausalLM.from_pretrained(word_folder)
    truncation = spectrim.Truncation(rank=4)
    result = spectrim.compress(decoder, calibration=token_batches, algorithm=truncation)
    tokenizer = pretrained.tokenizer(str(word_folder))
    language.save(tmp_path / "small", result.model, result.plan, tokenizer)
    lm = get_model("spectrim").create_from_arg_string(f"pretrained={tmp_path / 'small'}", {"device": "cpu"})
    ((found, _),) = lm.loglikelihood([Instance("loglikelihood", {}, ("w1 w2", " w3 w4"), 0)])
    ids = tokenizer("w1 w2 w3 w4", return_tensors="pt")["input_ids"]
    scores = result.model.eval()(input_ids=ids).logits.log_softmax(-1)
    expected = sum(scores[0, place - 1, ids[0, place]] for place in (2, 3))
    assert torch.tensor(found).isclose(torch.as_tensor(expected), atol=1e-4)


def test_without_the_harness_one_line_says_what_to_install() -> None:
    code = "import sys; sys.modules['lm_eval'] = None; from spectrim.cli.harness import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "pip install lm-eval" in done.stderr and len(done.stderr.splitlines()) == 1
