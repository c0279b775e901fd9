"""Decoders with unusual parts are compressed without a patch, whitened on one side or on both, and load back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spectrim
from spectrim.batches import evaluating
from spectrim.decomposers.whitened import WhitenedSVD
from spectrim.fetch import pretrained
from spectrim.losses import token_loss
from spectrim.statistics.objective import Objective

VOCABULARY, CONTEXT, SEQUENCE = 61, 64, 12
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
# Kind of model → settings → layers that must be factored. Nothing in a name tells that Phi-3 fuses projections.
CASES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "fused projections, long rotary scaling": (
        "Phi3",
        {"rope_parameters": LONG, "original_max_position_embeddings": 16, "tie_word_embeddings": False},
        {"qkv_proj", "gate_up_proj", "o_proj", "down_proj", "lm_head"},
    ),
    "a part of each head rotates": (
        "Phi",
        {"partial_rotary_factor": 0.5},
        {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2", "lm_head"},
    ),
    "one key for two queries, Llama 3's rotary scaling": (
        "Llama",
        {"num_key_value_heads": 1, "rope_parameters": LLAMA3, "tie_word_embeddings": True},
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    ),
    "norms of queries and keys": (
        "Qwen3",
        {"num_key_value_heads": 1, "head_dim": 12, "tie_word_embeddings": True},
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    ),
}
PIVOTED: dict[str, Any] = {"factors": "pivoted", "samples": 6}
DECOMPOSERS = [WhitenedSVD("channel", **PIVOTED), spectrim.TwoSidedSVD("channel", **PIVOTED)]


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, set[str]]:
    pytest.importorskip("transformers")
    kind, changes, names = CASES[request.param]
    transformers = pretrained.library()
    config = getattr(transformers, f"{kind}Config")(**SIZES, **changes)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval(), names


def objective(sequence: int = SEQUENCE) -> Objective:
    ids = torch.randint(3, VOCABULARY, (6, sequence))
    return Objective(token_loss, {"calibration": [({"input_ids": own}, own) for own in ids.split(3)]})


@pytest.mark.parametrize("decomposer", DECOMPOSERS, ids=lambda own: type(own).__name__)
def test_every_layer_is_factored_and_loads_back(case: Any, decomposer: Any, tmp_path: Path) -> None:
    model, names = case
    result = spectrim.Joint(params_kept=0.75, refit=0).compress(model, decomposer, objective())
    assert {name.rpartition(".")[2] for name in result.report["layer"]} == names
    assert 0.7 < result.params_kept <= 0.75
    spectrim.language.save(tmp_path, result.model, result.plan)
    loaded, _ = spectrim.language.load(tmp_path)
    longer = torch.randint(3, VOCABULARY, (2, 2 * SEQUENCE))  # beyond what the calibration showed
    with evaluating(loaded), evaluating(result.model), torch.no_grad():
        logits = result.model(longer).logits
        assert torch.isfinite(logits).all() and torch.equal(loaded(longer).logits, logits)


@pytest.mark.parametrize("sequence", [2, 3])
def test_sequences_of_a_few_tokens_calibrate(case: Any, sequence: int) -> None:
    """The moments have far fewer inputs than the layers have dimensions, so they are singular."""
    model, _ = case
    for decomposer in DECOMPOSERS:
        result = spectrim.Joint(params_kept=0.9, refit=0).compress(model, decomposer, objective(sequence))
        assert result.params_kept <= 0.9 and all(torch.isfinite(own).all() for own in result.model.parameters())


def test_weights_that_are_no_numbers_are_one_line(case: Any) -> None:
    model, _ = case
    with torch.no_grad():
        next(iter(model.model.layers[1].parameters())).fill_(float("nan"))
    for decomposer in DECOMPOSERS:
        with pytest.raises(spectrim.UserError, match="NaN|not finite|is nan") as refusal:
            spectrim.Joint(params_kept=0.9, refit=0).compress(model, decomposer, objective())
        assert "\n" not in str(refusal.value)
