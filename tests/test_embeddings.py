"""Embeddings, factored where the decomposer is asked to: a row looked up, then a matrix."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spectrim
from spectrim.algorithms.shared.decomposed import moments_for
from spectrim.algorithms.shared.measurement import Measurement
from spectrim.batches import evaluating
from spectrim.factored.forms import EmbeddingForm, PlainForm
from spectrim.factored.layers import FactoredEmbedding
from spectrim.factored.plan import Kept, RankPlan
from spectrim.refit.factors import refit
from spectrim.runs import configuration, targets
from spectrim.statistics.fisher import gate_gradients
from spectrim.statistics.input_moments import input_moments
from spectrim.statistics.objective import Objective
from spectrim.surgery import find_layers, replacing

IDS, WIDTH, CLASSES = 40, 12, 3
DECOMPOSERS = {
    "plain": spectrim.SVD(embeddings=True),
    "whitened": spectrim.WhitenedSVD(view="channel", samples=24, embeddings=True),
    "but some": spectrim.WhitenedSVD(view="channel", samples=24, embeddings=True, whole=0.4),
    "two-sided": spectrim.TwoSidedSVD(view="channel", samples=24, embeddings=True),
    "two-sided but some": spectrim.TwoSidedSVD(view="channel", samples=24, embeddings=True, whole=0.4),
}
FORMS = {kind: EmbeddingForm(whole_rows=4 if kind.endswith("but some") else 0) for kind in DECOMPOSERS}
MEASUREMENTS = "probe", "bound_probe"  # they compress nothing
ALGORITHMS = sorted({path.stem for path in (Path(configuration.CONF) / "algorithm").glob("*.yaml")} - {*MEASUREMENTS})
# One knows images alone, the other splits the inputs of layers.
REFUSED = ("aimet", "alds")
# What is trained as U, S and V starts from a plain SVD.
TRAINED = ("svd_training", "svd_training_nuclear", "svd_training_plain", "svd_training_priced", "cuttlefish", "haloc")
TRAINED += ("l0_gates",)


class Reader(nn.Module):
    """Texts to classes; of its two embeddings only ``token`` can be factored."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(IDS, WIDTH, padding_idx=0), nn.Embedding(10, WIDTH)
        self.body, self.head = nn.Linear(WIDTH, 24), nn.Linear(24, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.token(input_ids) + self.place(torch.arange(input_ids.shape[1]))
        x = torch.relu(self.body(x)) * attention_mask.unsqueeze(-1)
        return self.head(x.sum(1) / attention_mask.sum(1, keepdim=True))


class Peculiar(Reader):
    """Every way of using an embedding that forbids replacing it."""

    def __init__(self) -> None:
        super().__init__()
        self.cast, self.read = nn.Embedding(IDS, WIDTH), nn.Embedding(IDS, WIDTH)
        self.bounded = nn.Embedding(IDS, WIDTH, max_norm=1.0)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.cast(input_ids.int()) + self.bounded(input_ids) + self.read(input_ids) + self.read.weight[0]
        return super().forward(input_ids, attention_mask) + x.mean()


@pytest.fixture
def model() -> Reader:
    torch.manual_seed(0)
    return Reader().eval()


@pytest.fixture
def objective() -> Objective:
    """Low numbers often, high ones hardly ever, the ends of some texts padded."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(3):
        ids = 1 + (torch.rand(8, 6, generator=generator).pow(3) * (IDS - 11)).long()  # the last ten never come
        lengths = torch.randint(2, 7, (8, 1), generator=generator)
        mask = (torch.arange(6) < lengths).long()
        batches.append(
            ({"input_ids": ids * mask, "attention_mask": mask}, torch.randint(CLASSES, (8,), generator=generator))
        )
    return Objective(F.cross_entropy, dict.fromkeys(("calibration", "verification", "train"), batches))


def logits(model: nn.Module, objective: Objective) -> Tensor:
    with evaluating(model), torch.no_grad():
        return model(**objective.example())


def table(layer: Any) -> Tensor:
    """All rows of a factored embedding."""
    return layer(torch.arange(IDS)).detach()


def spectrum(model: Reader, objective: Objective, decomposer: Any) -> Any:
    return decomposer.spectrum(
        model.token, moments_for(decomposer, model, {"token": model.token}, objective).get("token", {})
    )


def test_one_is_factored_where_that_is_asked_for_and_nothing_forbids_it(model: Reader, objective: Objective) -> None:
    layers, left = find_layers.factorable(Peculiar(), objective.example(), embeddings=True)
    assert list(layers) == ["token", "body", "head"]
    assert left == {
        "place": "the ids that it looks up are not among the inputs",
        "cast": "the ids that it looks up are not among the inputs",
        "bounded": "it renormalises what it looks up, or has gradients of its own kind",
        "read": "the model reads its weight",
    }
    layers, left = find_layers.factorable(model, objective.example())
    assert list(layers) == ["body", "head"]
    assert left == dict.fromkeys(["token", "place"], "only a decomposer with embeddings=True factors embeddings")


@pytest.mark.parametrize("kind", DECOMPOSERS)
def test_full_rank_gives_the_embedding_back(kind: str, model: Reader, objective: Objective) -> None:
    own = spectrum(model, objective, DECOMPOSERS[kind])
    plan = RankPlan.of({"token": own.kept(own.max_rank)})
    whole = replacing.apply(model, plan, {"token": own})
    assert isinstance(whole.token, FactoredEmbedding)
    torch.testing.assert_close(table(whole.token), model.token.weight.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(whole, objective), logits(model, objective), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", DECOMPOSERS)
def test_curves_agree_with_the_factored_embedding(kind: str, model: Reader, objective: Objective) -> None:
    own = spectrum(model, objective, DECOMPOSERS[kind])
    gradient = objective.gradients(model, ["token"])["token"]
    assert own.cost(own.break_even) < model.token.weight.numel() <= own.cost(own.break_even + 1)
    assert own.rank_within(own.cost(5)) == 5 and own.rank_within(own.cost(5) - 1) == 4
    assert float(own.relative_error()[1]) == pytest.approx(float(own.error()[1] / model.token.weight.detach().norm()))
    for rank in (1, 5, own.max_rank):
        factored = own.factor(rank)
        change = (table(factored) - model.token.weight).detach().double()
        assert float(own.error()[rank]) == pytest.approx(float(change.norm()), rel=1e-4, abs=1e-5)
        assert float(own.largest_entry()[rank]) == pytest.approx(float(change.abs().max()), rel=1e-4, abs=1e-5)
        expected = float((gradient * change).sum())
        assert float(own.first_order(gradient)[rank]) == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert own.cost(rank) == sum(parameter.numel() for parameter in factored.parameters())


def test_the_moment_is_how_often_each_id_comes_and_what_never_came_may_come(
    model: Reader, objective: Objective
) -> None:
    moment = input_moments(model, {"token": ("embedding",)}, objective, 24)["token"]["embedding"]
    inputs = [inputs for inputs, _ in objective.batches("calibration")]
    ids = torch.cat([one["input_ids"][one["attention_mask"].bool()] for one in inputs])
    counts = torch.tensor([int((ids == i).sum()) for i in range(IDS)]).double()
    once = float((counts == 1).sum() / counts.sum())
    assert once > 0 and (counts == 0).any() and counts[0] == 0  # padding is no token
    torch.testing.assert_close(moment, ((1 - once) * counts / counts.sum() + once / IDS).unsqueeze(0))
    assert float(moment.sum()) == pytest.approx(1) and (moment > 0).all()


def test_whitened_is_the_decomposition_of_a_linear_layer_of_one_hot_inputs(model: Reader, objective: Objective) -> None:
    decomposer = DECOMPOSERS["whitened"]
    own = spectrum(model, objective, decomposer)
    linear = nn.Linear(IDS, WIDTH, bias=False)
    linear.weight = nn.Parameter(model.token.weight.detach().T.clone())
    frequency = input_moments(model, {"token": ("embedding",)}, objective, 24)["token"]["embedding"]
    same = decomposer.spectrum(linear, {"linear": torch.diag_embed(frequency)})
    torch.testing.assert_close(own.importance, same.importance)
    torch.testing.assert_close(table(own.factor(4)), same.factor(4)(torch.eye(IDS)).detach(), atol=1e-5, rtol=1e-4)


def test_often_used_rows_are_kept_better_than_by_plain_svd(model: Reader, objective: Objective) -> None:
    frequency = input_moments(model, {"token": ("embedding",)}, objective, 24)["token"]["embedding"].squeeze(0)
    errors = {}
    for kind, decomposer in DECOMPOSERS.items():
        change = table(spectrum(model, objective, decomposer).factor(4)) - model.token.weight.detach()
        errors[kind] = float((frequency * change.square().sum(1)).sum())
    assert errors["whitened"] < 0.9 * errors["plain"]


def test_the_most_frequent_rows_stay_as_they_are(model: Reader, objective: Objective) -> None:
    frequency = input_moments(model, {"token": ("embedding",)}, objective, 24)["token"]["embedding"].squeeze(0)
    own = spectrum(model, objective, DECOMPOSERS["but some"])
    factored, often = own.factor(2), frequency.argsort(descending=True)[: len(own.rows)]
    assert 0.4 <= float(frequency[often].sum()) < 0.4 + float(frequency[often[-1]])
    rare = torch.ones(IDS, dtype=torch.bool)
    rare[often] = False
    weight = model.token.weight.detach()
    assert table(factored)[often].equal(weight[often])
    alone = nn.Embedding.from_pretrained(weight[rare])
    others = DECOMPOSERS["whitened"].spectrum(alone, {"embedding": frequency[rare].unsqueeze(0)})
    expected = others.factor(2)(torch.arange(int(rare.sum()))).detach()
    torch.testing.assert_close(table(factored)[rare], expected, atol=1e-5, rtol=1e-4)


def test_what_is_kept_of_embeddings_is_a_part_of_them() -> None:
    for whole in (-0.1, 1.0):
        with pytest.raises(spectrim.UserError, match=r"whole must lie in \[0, 1\)"):
            spectrim.WhitenedSVD(embeddings=True, whole=whole)
    with pytest.raises(spectrim.UserError, match="set embeddings=true, too"):
        spectrim.WhitenedSVD(whole=0.5)


def test_a_plan_that_keeps_all_rows_is_refused(model: Reader) -> None:
    with pytest.raises(spectrim.UserError, match="of 40 rows 40 stay whole, which leaves none"):
        EmbeddingForm(whole_rows=40).layer_for(model.token, 2)


@pytest.mark.parametrize("kind", DECOMPOSERS)
def test_gates_are_the_first_order_change_of_dropping_a_component(
    kind: str, model: Reader, objective: Objective
) -> None:
    own = spectrum(model, objective, DECOMPOSERS[kind])
    whole = replacing.apply(model, RankPlan.of({"token": own.kept(own.max_rank)}), {"token": own})
    rows = gate_gradients(whole, ["token"], objective, samples=24).rows["token"]
    assert rows.given.shape == (24, own.max_rank)
    components = own.first_order(objective.gradients(model, ["token"])["token"]).diff()
    torch.testing.assert_close(rows.given.mean(0).double(), components, atol=1e-6, rtol=1e-4)


def test_a_refit_leaves_it_as_it_is(model: Reader, objective: Objective) -> None:
    layers, _ = find_layers.factorable(model, objective.example(), embeddings=True)
    spectra = {name: DECOMPOSERS["plain"].spectrum(layer) for name, layer in layers.items()}
    plan = RankPlan.of({"token": Kept(3, EmbeddingForm()), "body": Kept(3, PlainForm("linear"))})
    cut = replacing.apply(model, plan, spectra)
    before = table(cut.token), cut.body.second.weight.clone()
    refit(cut, model, objective, 24)
    assert torch.equal(table(cut.token), before[0]) and not torch.equal(cut.body.second.weight, before[1])


@pytest.mark.parametrize("kind", DECOMPOSERS)
def test_joint_selection_weighs_it_against_the_layers_and_it_loads_back(
    kind: str, model: Reader, objective: Objective, tmp_path: Path
) -> None:
    result = spectrim.Joint(params_kept=0.7, samples=24).compress(model, DECOMPOSERS[kind], objective)
    assert result.params_kept <= 0.7 and result.plan["token"].form == FORMS[kind]
    assert any(note.startswith("place: left dense") for note in result.notes)
    result.save(tmp_path / "x.safetensors")
    loaded = spectrim.load(tmp_path / "x.safetensors", into=Reader())
    assert torch.equal(logits(loaded, objective), logits(result.model, objective))


def test_a_block_of_layers_at_a_time_selects_the_same(model: Reader, objective: Objective) -> None:
    selector, decomposer = spectrim.Joint(params_kept=0.7, samples=24), DECOMPOSERS["but some"]
    together = selector.compress(model, decomposer, objective)
    apart = selector.compress(model, decomposer, Objective(objective.loss, objective.splits, layers_at_once=1))
    assert apart.plan == together.plan
    torch.testing.assert_close(logits(apart.model, objective), logits(together.model, objective), atol=1e-5, rtol=1e-5)


def test_it_is_never_cut_to_save_multiplications(model: Reader, objective: Objective) -> None:
    result = spectrim.Joint(macs_kept=0.7, samples=24).compress(model, DECOMPOSERS["whitened"], objective)
    assert "token" not in result.plan and result.macs_kept <= 0.7


@pytest.mark.parametrize("kind", DECOMPOSERS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_any_algorithm_takes_it_or_says_why_not(
    name: str, kind: str, compose: Any, brief: Any, model: Reader, objective: Objective
) -> None:
    selector = brief(targets.build(configuration.plain(compose(f"algorithm={name}").algorithm)))
    if isinstance(selector, Measurement):
        assert selector.measure(model, DECOMPOSERS[kind], objective).rows
        return
    unreachable = name == "layer_threshold" and kind.startswith(
        "two-sided"
    )  # its size, by thresholds of one layer each
    if name in REFUSED or (kind != "plain" and name in TRAINED) or unreachable:
        with pytest.raises(spectrim.UserError) as refusal:
            selector.compress(model, DECOMPOSERS[kind], objective)
        assert "\n" not in str(refusal.value)
        return
    result = selector.compress(model, DECOMPOSERS[kind], objective)
    assert "token" in set(result.report["layer"]) and result.params_kept <= 1
    assert torch.isfinite(logits(result.model, objective)).all()
