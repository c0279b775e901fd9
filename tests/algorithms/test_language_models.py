"""GPT-2 (whose Conv1D stores its weight transposed), Llama and BERT, through every kind of algorithm."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim
from spectrim.batches import evaluating, forward
from spectrim.decomposers.spectrum import spectrum_of
from spectrim.factored.plan import RankPlan
from spectrim.losses import logits_of, token_loss
from spectrim.statistics.input_moments import input_moments
from spectrim.statistics.objective import Objective
from spectrim.surgery import find_layers, replacing

VOCABULARY = 61  # of the tiny models
KINDS = ("gpt2", "llama", "bert")
ALGORITHMS: dict[str, Any] = {
    "truncation": spectrim.Truncation(rank=3),
    "lossless": spectrim.Lossless(gamma=None),
    "lossless verified": spectrim.Lossless(gamma=None, verified=True, verified_tolerance=0.05, tries=2),
    "compact": spectrim.Compact(gamma=None),
    "rank selection": spectrim.RankSelection(epsilon=0.1, delta_step=0.1),
    "joint by MACs": spectrim.Joint(macs_kept=0.9),
    "joint": spectrim.Joint(params_kept=0.8),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def case(kind: str, tiny: Any, token_batches: Any) -> tuple[nn.Module, Objective]:
    """A model and its objective: BERT tells three classes apart, the others predict tokens."""
    if kind != "bert":
        splits = {"calibration": token_batches, "verification": token_batches, "train": token_batches}
        return tiny(kind), Objective(token_loss, splits)
    labelled = [(inputs, torch.randint(3, (3,))) for inputs, _ in token_batches]
    splits = {"calibration": labelled, "verification": labelled, "train": labelled}
    return tiny(kind), Objective(torch.nn.functional.cross_entropy, splits)


def logits(model: nn.Module, inputs: Any) -> Tensor:
    with evaluating(model), torch.no_grad():
        return logits_of(forward(model, inputs))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_compresses_and_loads_back(case: Any, name: str, tmp_path: Path) -> None:
    model, objective = case
    before = copy.deepcopy(model.state_dict())
    result = ALGORITHMS[name].compress(model, spectrim.SVD(), objective)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert result.params_kept < 1 or not result.plan
    assert name in ("lossless verified", "rank selection") or result.plan
    result.save(tmp_path / "x.safetensors")
    loaded = spectrim.load(tmp_path / "x.safetensors", into=type(model)(model.config))
    inputs = objective.example()
    assert torch.equal(logits(loaded, inputs), logits(result.model, inputs))


@pytest.mark.parametrize("decomposer", [spectrim.SVD(), spectrim.WhitenedSVD(view="channel", samples=6)])
def test_at_full_rank_every_layer_is_what_it_was(case: Any, decomposer: Any) -> None:
    model, objective = case
    layers, _ = find_layers.factorable(model, objective.example())
    moments = {}
    if decomposer.samples:
        views = {name: decomposer.views(layer) for name, layer in layers.items()}
        moments = input_moments(model, views, objective, decomposer.samples)
    spectra = {name: spectrum_of(layer, decomposer, moments.get(name, {})) for name, layer in layers.items()}
    plan = RankPlan.of({name: spectrum.kept(spectrum.max_rank) for name, spectrum in spectra.items()})
    whole = replacing.apply(model, plan, spectra)
    inputs = objective.example()
    torch.testing.assert_close(logits(whole, inputs), logits(model, inputs), atol=1e-4, rtol=1e-4)


def test_the_curve_is_the_inner_product_with_the_gradient_at_every_rank(case: Any) -> None:
    model, objective = case
    layers, _ = find_layers.factorable(model, objective.example())
    gradients = objective.gradients(model, list(layers))
    name = next(iter(layers))
    spectrum, weight = spectrum_of(layers[name], spectrim.SVD()), layers[name].weight.detach()
    curve = spectrum.first_order(gradients[name])
    for rank in (1, 5, spectrum.max_rank):
        cut = spectrum.factor(rank)
        product = (cut.second.weight @ cut.first.weight).detach()  # (O, I), as a Linear has it
        change = (product.t() if type(layers[name]).__name__ == "Conv1D" else product) - weight
        assert float(curve[rank]) == pytest.approx(float((change * gradients[name]).sum()), rel=1e-3, abs=1e-6)


def test_whitened_joint_and_rank_selection(case: Any) -> None:
    model, objective = case
    for algorithm in (ALGORITHMS["joint"], ALGORITHMS["rank selection"]):
        result = algorithm.compress(model, spectrim.WhitenedSVD(view="channel", samples=6), objective)
        assert objective.evaluate(result.model).loss == pytest.approx(objective.evaluate(model).loss, abs=0.5)


def test_trained_as_factors(case: Any, brief: Any) -> None:
    model, objective = case
    result = brief(spectrim.SVDTraining(regulariser="none", epsilon=0.1)).compress(model, spectrim.SVD(), objective)
    assert len(result.log) == 2 and result.trained


@pytest.mark.parametrize("kind", ["gpt2", "llama"], indirect=True)
def test_a_tied_head_is_left_dense_and_stays_tied(case: Any) -> None:
    model, objective = case
    result = ALGORITHMS["truncation"].compress(model, spectrim.SVD(), objective)
    assert any(note.startswith("lm_head: left dense: its weight is shared with") for note in result.notes)
    assert result.model.lm_head.weight is result.model.get_input_embeddings().weight


def test_the_embedding_of_tokens_is_factored_with_the_head_that_is_tied_to_it(
    case: Any, kind: str, tmp_path: Path
) -> None:
    model, objective = case
    decomposer = spectrim.WhitenedSVD(view="channel", samples=6, embeddings=True)
    result = spectrim.Truncation(rank=3).compress(model, decomposer, objective)
    tokens = {"gpt2": "transformer.wte", "llama": "model.embed_tokens", "bert": "bert.embeddings.word_embeddings"}
    assert tokens[kind] in result.plan and "lm_head" not in result.plan
    places = {"gpt2": "transformer.wpe", "bert": "bert.embeddings.position_embeddings"}
    if kind in places:
        reason = f"{places[kind]}: left dense: the ids that it looks up are not among the inputs"
        assert any(note.startswith(reason) for note in result.notes)
    result.save(tmp_path / "x.safetensors")
    loaded = spectrim.load(tmp_path / "x.safetensors", into=type(model)(model.config))
    assert torch.equal(logits(loaded, objective.example()), logits(result.model, objective.example()))


def test_the_plan_does_not_depend_on_the_size_of_batches(tiny: Any) -> None:
    model, ids = tiny("llama"), torch.randint(VOCABULARY, (8, 17))
    joint = spectrim.Joint(params_kept=0.8, samples=8, refit=0, significance=1.0)
    both = spectrim.TwoSidedSVD("channel", samples=8, factors="pivoted")
    splits = [{"calibration": [(x, x) for x in ids.split(size)]} for size in (1, 4)]
    plans = [joint.compress(model, both, Objective(token_loss, split)).plan for split in splits]
    assert plans[0] and plans[0] == plans[1]


def test_an_untied_head_is_a_layer_like_any_other(tiny: Any, token_batches: Any) -> None:
    model = tiny("llama", tie_word_embeddings=False)
    result = ALGORITHMS["truncation"].compress(
        model, spectrim.SVD(), Objective(token_loss, {"calibration": token_batches})
    )
    assert "lm_head" in result.plan


def test_padding_takes_no_part_in_the_moments(tiny: Any, token_batches: Any) -> None:
    model = tiny("gpt2")
    alone = []
    for inputs, targets in token_batches:
        for ids, mask, labels in zip(inputs["input_ids"], inputs["attention_mask"], targets, strict=True):
            length = int(mask.sum())
            alone.append(({"input_ids": ids[None, :length]}, labels[None, :length]))
    views = {"transformer.h.0.attn.c_attn": ("linear",), "transformer.h.1.mlp.c_proj": ("linear",)}
    padded, bare = (
        input_moments(model, views, Objective(token_loss, {"calibration": batches}), 6)
        for batches in (token_batches, alone)
    )
    for name, own in padded.items():
        torch.testing.assert_close(own["linear"], bare[name]["linear"], atol=1e-5, rtol=1e-4)


def test_the_macs_of_attention_are_counted(tiny: Any, token_batches: Any) -> None:
    model, objective = tiny("gpt2"), Objective(token_loss, {"calibration": token_batches})
    result = ALGORITHMS["truncation"].compress(model, spectrim.SVD(), objective)
    tokens, width, layers = 12, 24, 2
    products = layers * (12 * width * width) * tokens + VOCABULARY * width * tokens
    assert result.dense_cost.macs == products + layers * 2 * tokens * tokens * width


def test_a_model_without_a_known_layer_is_refused(token_batches: Any) -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(61, 61)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.embedding(input_ids)

    with pytest.raises(spectrim.UserError, match="nothing to factor: embedding: only a decomposer") as refusal:
        ALGORITHMS["truncation"].compress(Bag(), spectrim.SVD(), Objective(token_loss, {"calibration": token_batches}))
    assert "\n" not in str(refusal.value)
