"""A decoder writes its own calibration text: samples of its distribution, the same ones for a seed."""

from typing import Any

import pytest
import torch
from torch import nn

from spectrim.data import own_text as module
from spectrim.data.own_text import mixed, own_text
from spectrim.errors import UserError
from spectrim.losses import token_loss

CONTEXT = 12


def test_the_text_is_drawn_from_the_distribution_of_the_model(tiny: Any) -> None:
    """The frequency of the first token is its probability, though the model's settings of generation are narrow."""
    model = tiny("gpt2")
    model.generation_config.update(do_sample=True, top_k=1, temperature=0.1, eos_token_id=3, max_new_tokens=2)
    before = model.generation_config.to_dict()
    with torch.no_grad():
        nn.init.normal_(model.transformer.wte.weight, std=0.5)  # tied to the head
        first = model.config.bos_token_id
        likely = model(input_ids=torch.tensor([[first]])).logits[0, -1].softmax(-1)
    text = own_text(model, blocks=2000, context=2)
    seen = torch.bincount(text.labels[:, 1], minlength=len(likely)) / 2000
    assert likely.max() > 3 / len(likely)
    assert (seen - likely).abs().max() < 5 * (likely.max() / 2000).sqrt()
    assert model.generation_config.to_dict() == before


def test_on_its_own_text_the_mean_gradient_of_a_model_is_chance(tiny: Any) -> None:
    model, size = tiny("gpt2"), 600
    text = own_text(model, size, CONTEXT, batch_size=1)
    weight = model.transformer.h[0].mlp.c_fc.weight

    def mean_over_error(targets: Any) -> float:
        rows = []
        for inputs, _ in text:
            (gradient,) = torch.autograd.grad(token_loss(model(**inputs), targets(inputs["input_ids"])), weight)
            rows.append(gradient.flatten())
        G = torch.stack(rows)
        return float(G.mean(0).square().sum() / (G.var(0).sum() / size))

    assert mean_over_error(lambda ids: ids) < 1.5  # 1 in the mean
    assert mean_over_error(lambda ids: ids * 0 + 7) > 20


def test_a_seed_gives_the_same_text_and_leaves_the_generator_and_the_mode_alone(tiny: Any) -> None:
    model = tiny("llama").train()
    state = torch.random.get_rng_state()
    one, same, other = (own_text(model, 3, CONTEXT, seed) for seed in (0, 0, 1))
    assert torch.equal(one.labels, same.labels) and one.digest() == same.digest()
    assert not torch.equal(one.labels, other.labels) and one.digest() != other.digest()
    assert torch.equal(state, torch.random.get_rng_state()) and model.training
    assert one.labels.shape == (3, CONTEXT) and len({tuple(row) for row in one.labels.tolist()}) == 3


def test_more_blocks_than_are_written_at_once_are_all_different(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 2)
    text = own_text(tiny("gpt2"), 5, CONTEXT)
    assert len({tuple(row) for row in text.labels.tolist()}) == 5


def test_two_splits_together_hold_the_blocks_of_both(tiny: Any) -> None:
    one, other = own_text(tiny("gpt2"), 3, CONTEXT, 0), own_text(tiny("gpt2"), 4, CONTEXT, 1)
    both = mixed(one, other, 0)
    rows = [tuple(row) for row in torch.cat([one.labels, other.labels]).tolist()]
    found = [tuple(row) for row in both.labels.tolist()]
    assert sorted(found) == sorted(rows) and found != rows
    assert mixed(one, other, 1).digest() != both.digest()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"blocks": 0}, "blocks must be a whole number of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"context": 1}, "context must be a whole number of at least 2"),
        ({"context": 33}, "context must be .* at most 32, the positions of the model; got 33"),
        ({"seed": -1}, "seed=-1 is not a whole number"),
    ],
)
def test_a_setting_that_cannot_be_is_named(tiny: Any, settings: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        own_text(tiny("gpt2"), **({"context": CONTEXT} | settings))


def test_a_model_that_writes_no_text_is_refused(tiny: Any) -> None:
    for model in (nn.Linear(2, 2), tiny("bert")):
        with pytest.raises(UserError, match=f"a {type(model).__name__} does not write text of its own"):
            own_text(model)
    silent = tiny("gpt2")
    silent.config.bos_token_id = silent.config.eos_token_id = None
    with pytest.raises(UserError, match="set its bos_token_id"):
        own_text(silent, context=CONTEXT)


def test_all_positions_of_a_model_can_be_written(tiny: Any) -> None:
    assert own_text(tiny("gpt2"), 2, 32).labels.shape == own_text(tiny("llama"), 2, 32).labels.shape == (2, 32)
