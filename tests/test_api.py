"""The one-call interface, as its users type it."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spectrim
from spectrim.algorithms.related.global_threshold import GlobalThreshold
from spectrim.api import NO_SIZE, _chosen
from spectrim.batches import evaluating
from spectrim.decomposers.best_view import PIVOTED, BestView
from spectrim.factored.forms import PivotedForm, PlainForm
from spectrim.losses import label_loss, span_loss, token_loss
from spectrim.runs import configuration
from spectrim.runs.named import decomposer_for, named


def logits(model: nn.Module, x: Any) -> Tensor:
    with evaluating(model), torch.no_grad():
        return model(x)


@pytest.mark.parametrize(
    "algorithm",
    [spectrim.Lossless(gamma=None), spectrim.Truncation(ratio=0.5), spectrim.Compact(gamma=None, tolerance=1e9)],
)
@pytest.mark.parametrize("decomposer", [None, spectrim.SVD(view="spatial")])
def test_compress_save_load_gives_the_same_logits(
    net: nn.Sequential, batches: Any, tmp_path: Path, algorithm: Any, decomposer: Any
) -> None:
    dense = copy.deepcopy(net)
    result = spectrim.compress(net, calibration=batches, algorithm=algorithm, decomposer=decomposer)
    assert result.plan and result.params_kept < 1
    path = tmp_path / "small.safetensors"
    result.save(path)
    model = spectrim.load(path, into=dense)
    x = batches[0][0]
    assert torch.equal(logits(model, x), logits(result.model, x))
    assert path.stat().st_size < 4 * result.cost.params + 4000


def test_a_result_prints_as_one_line(net: nn.Sequential, batches: Any) -> None:
    result = spectrim.compress(net, calibration=batches, params_kept=0.5)
    assert repr(result).startswith(f"Compressed Sequential: {100 * result.params_kept:.1f} % of the parameters, ")
    assert f" {len(result.plan)} layers factored" in str(result) and "\n" not in str(result)


def test_lossless_on_the_channel_view_is_the_default(net: nn.Sequential, batches: Any) -> None:
    by_default = spectrim.compress(net, calibration=batches)
    spelt_out = spectrim.compress(
        net,
        calibration=batches,
        loss=F.cross_entropy,
        algorithm=spectrim.Lossless(gamma=0.03),
        decomposer=spectrim.SVD(view="channel"),
    )
    assert by_default.plan == spelt_out.plan
    assert by_default.notes == [*spelt_out.notes, NO_SIZE]
    assert isinstance(by_default, spectrim.Compressed) and isinstance(by_default.plan, spectrim.RankPlan)


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_device_are_kept(net: nn.Sequential, batches: Any, training: bool) -> None:
    net.train(training)
    result = spectrim.compress(net, calibration=batches, algorithm=spectrim.Truncation(rank=1))
    assert {module.training for module in net.modules()} == {training}
    assert {module.training for module in result.model.modules()} == {training}
    assert {p.device for p in result.model.parameters()} == {torch.device("cpu")}


def test_any_iterable_of_batches_is_taken(net: nn.Sequential, batches: Any) -> None:
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=10)
    by_loader = spectrim.compress(net, calibration=loader)
    assert by_loader.plan == spectrim.compress(net, calibration=tuple(batches)).plan
    with pytest.raises(spectrim.UserError, match="can be read only once"):
        spectrim.compress(net, calibration=iter(batches))


class Reconstruction(nn.Module):
    """Takes its inputs by name and returns something that is not scores."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(12, 10), nn.Linear(10, 12)

    def forward(self, signal: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"signal": self.decode(torch.tanh(self.encode(signal * mask)))}


def test_any_module_and_any_loss_are_taken() -> None:
    batches = [({"mask": torch.ones(8, 12), "signal": torch.randn(8, 12)}, torch.randn(8, 12)) for _ in range(2)]
    result = spectrim.compress(
        Reconstruction(),
        calibration=batches,
        loss=lambda out, targets: F.mse_loss(out["signal"], targets),
        algorithm=spectrim.Truncation(rank=3),
    )
    assert list(result.plan) == ["decode", "encode"]
    assert result.dense_cost.macs == 240 and result.cost.macs == 2 * 3 * 22


class Attention(nn.Module):
    """Tokens, a tied embedding, attention, and a linear layer in the open."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.attention = nn.Embedding(13, 16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.body, self.spare, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 13, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(self.body(self.attention(x, x, x)[0])).mean(1)


def test_layers_that_must_stay_dense_are_noted(tmp_path: Path) -> None:
    tokens = torch.randint(13, (6, 5))
    model = Attention()
    result = spectrim.compress(
        model, calibration=[(tokens, torch.randint(13, (6,)))], algorithm=spectrim.Truncation(rank=2)
    )
    assert "body" in result.plan
    assert result.notes == [
        "embedding: left dense: only a decomposer with embeddings=True factors embeddings (11.30% of the parameters)",
        "head: left dense: its weight is shared with another layer (11.30% of the parameters)",
        "spare: left dense: the model does not call it (14.78% of the parameters)",
    ]
    assert result.model.head.weight is result.model.embedding.weight
    result.save(tmp_path / "tied.safetensors")
    loaded = spectrim.load(tmp_path / "tied.safetensors", into=Attention())
    assert loaded.head.weight is loaded.embedding.weight
    assert torch.equal(logits(loaded, tokens), logits(result.model, tokens))


def test_what_cannot_be_compressed_is_said_in_one_line(net: nn.Sequential, batches: Any) -> None:
    x = batches[0][0]
    for calibration, message in [
        ([], "calibration split is empty"),
        ([(x, torch.full((16,), 5))], "target 5 does not fit a model with 5 classes; they count from 0"),
        (
            [(x.numpy(), batches[0][1])],
            r"the model failed on inputs of shape ndarray.*; give tensors, such as torch.from",
        ),
        ([(x, batches[0][1].float())], "the loss failed on these .*; give classes as int64 tensors, or loss="),
        ([(x * torch.nan, batches[0][1])], "loss on the calibration split is nan"),
    ]:
        with pytest.raises(spectrim.UserError, match=message) as refusal:
            spectrim.compress(net, calibration=calibration)
        assert "\n" not in str(refusal.value)


def test_batch_norm_follows_the_compression_where_asked(net: nn.Sequential, batches: Any) -> None:
    before = copy.deepcopy(net.state_dict())
    arguments: Any = {"calibration": batches, "algorithm": spectrim.Truncation(ratio=0.4)}
    kept, followed = (spectrim.compress(net, **arguments, batch_norm=how) for how in ("keep", "follow"))
    assert kept.plan == followed.plan
    assert torch.equal(
        logits(spectrim.compress(net, **arguments).model, batches[0][0]), logits(kept.model, batches[0][0])
    )
    moved = [
        n for n, value in kept.model.state_dict().items() if not torch.equal(value, followed.model.state_dict()[n])
    ]
    assert moved == ["1.running_mean", "1.running_var"]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    outputs = {how: result.model[0](batches[0][0]) for how, result in (("keep", kept), ("follow", followed))}
    assert torch.equal(outputs["keep"], outputs["follow"])


def test_batch_norm_of_what_was_not_compressed_stays(net: nn.Sequential, batches: Any) -> None:
    result = spectrim.compress(net, calibration=batches, algorithm=spectrim.Lossless(gamma=1e-9), batch_norm="follow")
    assert not result.plan and torch.equal(result.model[1].running_mean, net[1].running_mean)


def test_another_choice_for_batch_norm_is_refused_before_anything_is_done(net: nn.Sequential) -> None:
    with pytest.raises(spectrim.UserError, match="batch_norm is one of keep, follow, not 'refit'"):
        spectrim.compress(net, calibration=[], batch_norm="refit")  # type: ignore[arg-type]


def test_names_at_the_top() -> None:
    assert all(getattr(spectrim, name).__name__ == name for name in spectrim.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Losless'"):
        spectrim.Losless  # noqa: B018


def test_a_model_is_trained_at_low_rank_saved_and_loaded(net: nn.Sequential, batches: Any, tmp_path: Path) -> None:
    recipe = spectrim.Recipe(epochs=2, lr=0.01, precision="float32")
    algorithm = spectrim.SVDTraining(recipe=recipe, epsilon=0.1, delta_step=0.1)
    dense = copy.deepcopy(net)
    result = spectrim.compress(net, calibration=batches, train=batches, algorithm=algorithm)
    assert result.plan and result.params_kept < 1
    result.save(tmp_path / "small.safetensors")
    model = spectrim.load(tmp_path / "small.safetensors", into=dense)
    torch.testing.assert_close(logits(model, batches[0][0]), logits(result.model, batches[0][0]))
    with pytest.raises(spectrim.UserError, match="^train batches are missing; pass train="):
        spectrim.compress(net, calibration=batches, algorithm=algorithm)


X = torch.randn(8, 32)
UNLABELLED: Any = [None, [X], [(X,)], [(X, None)]]
LABEL_FREE = [
    spectrim.Truncation(ratio=0.5),
    spectrim.Truncation(params_kept=0.6),
    "evbmf",
    "global_threshold",
    "knapsack",
    "alds",
]


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))


@pytest.mark.parametrize("algorithm", LABEL_FREE, ids=str)
@pytest.mark.parametrize("calibration", UNLABELLED, ids=["none", "inputs", "one of a kind", "no targets"])
def test_what_measures_no_loss_needs_no_labels(algorithm: Any, calibration: Any) -> None:
    model = perceptron()
    if calibration is None and algorithm == "knapsack":  # its own decomposer reads inputs
        with pytest.raises(spectrim.UserError, match="^calibration batches are missing"):
            spectrim.compress(model, calibration=calibration, algorithm=algorithm)
        return
    result = spectrim.compress(model, calibration=calibration, algorithm=algorithm)
    labelled = spectrim.compress(model, calibration=[(X, torch.randint(10, (8,)))], algorithm=algorithm)
    assert result.plan == labelled.plan and result.params_kept == labelled.params_kept
    assert torch.equal(logits(result.model, X), logits(labelled.model, X))
    predicted = "predicted_change"
    assert result.report[predicted].isna().all() and labelled.report[predicted].notna().all()
    pd.testing.assert_frame_equal(result.report.drop(columns=predicted), labelled.report.drop(columns=predicted))
    with pytest.raises(spectrim.UserError, match="calibration batches"):
        result.predicted_change  # noqa: B018


def test_without_inputs_macs_are_not_known() -> None:
    result = spectrim.compress(perceptron(), algorithm=spectrim.Truncation(ratio=0.5))
    with pytest.raises(spectrim.UserError, match="pass calibration="):
        result.macs_kept  # noqa: B018
    with pytest.raises(spectrim.UserError, match="^macs_kept runs the model; pass calibration="):
        spectrim.compress(perceptron(), algorithm=GlobalThreshold(params_kept=None, macs_kept=0.5))


def test_without_inputs_what_torch_itself_may_read_stays_dense() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 64, batch_first=True), nn.Linear(16, 16))
    result = spectrim.compress(model, algorithm=spectrim.Truncation(rank=2))
    assert "1" in result.plan and result.model(torch.randn(2, 3, 16)).shape == (2, 3, 16)

    class Reads(nn.TransformerEncoderLayer):
        """A layer that is none of torch's own, which may do anything with what it holds."""

    Reads.__module__ = "torch.nn.modules.other"
    model = nn.Sequential(Reads(16, 2, 64, batch_first=True), nn.Linear(16, 16))
    result = spectrim.compress(model, algorithm=spectrim.Truncation(rank=2))
    assert "1" in result.plan and "0.linear1" not in result.plan
    assert "0.linear1: left dense: a Reads may read its weight" in " ".join(result.notes)


def test_a_selection_that_needs_targets_says_that_they_are_missing() -> None:
    for algorithm in (None, spectrim.RankSelection()):
        with pytest.raises(spectrim.UserError, match="^the calibration batches have no targets, which the loss needs"):
            spectrim.compress(perceptron(), calibration=[X], algorithm=algorithm)


def test_a_loss_of_the_outputs_alone_needs_no_targets() -> None:
    result = spectrim.compress(
        perceptron(),
        calibration=[X],
        loss=lambda outputs, _: outputs.square().mean(),
        algorithm=spectrim.Compact(gamma=None, tolerance=1e9),
    )
    assert result.plan and isinstance(result.predicted_change, float)


def test_the_report_takes_its_gradient_when_it_is_read(net: nn.Sequential, batches: Any) -> None:
    calls = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if torch.is_grad_enabled() and outputs.requires_grad:  # not where the loss itself is checked
            calls.append(1)
        return F.cross_entropy(outputs, targets)

    result = spectrim.compress(net, calibration=batches, loss=loss, algorithm=spectrim.Truncation(rank=2))
    assert not calls
    assert result.report is result.report and result.reporting["samples_read"] == {"calibration": 39}
    assert len(calls) == len(batches)
    changed = spectrim.compress(net, calibration=batches, loss=loss, algorithm=spectrim.Truncation(rank=2))
    with torch.no_grad():
        net[0].weight.mul_(2)
    with pytest.raises(spectrim.UserError, match="the given model has changed since it was compressed"):
        changed.predicted_change  # noqa: B018


def test_algorithms_and_decomposers_are_known_by_their_names(net: nn.Sequential, batches: Any) -> None:
    by_name = spectrim.compress(net, calibration=batches, algorithm="compact_verified", verification=batches)
    verified = spectrim.Compact(verified=True, gamma=0.1, tries=3)
    assert by_name.plan == spectrim.compress(net, calibration=batches, algorithm=verified, verification=batches).plan
    by_name = spectrim.compress(net, calibration=batches, algorithm="joint", decomposer="whitened_spatial")
    spelt_out = spectrim.compress(
        net, calibration=batches, algorithm=spectrim.Joint(params_kept=0.5), decomposer=spectrim.WhitenedSVD("spatial")
    )
    assert by_name.plan == spelt_out.plan


@pytest.mark.parametrize("group", ["algorithm", "decomposer"])
def test_every_name_is_known(group: str) -> None:
    for path in Path(configuration.CONF, group).glob("*.yaml"):
        if path.stem == "fine_tuning":
            with pytest.raises(spectrim.UserError, match="^algorithm='fine_tuning' needs settings of its own"):
                named(group, path.stem)
        else:
            made = named(group, path.stem)
            assert hasattr(made, "compress") or hasattr(made, "measure") or hasattr(made, "spectrum")


def test_a_name_whose_file_changes_a_part_of_another_has_the_rest_of_it() -> None:
    changed, rest = named("decomposer", "two_sided_embeddings").base, named("decomposer", "two_sided").base
    assert changed == replace(rest, embeddings=True, whole=0.9) != rest


@pytest.mark.parametrize(
    ("argument", "value", "said"),
    [
        (
            "algorithm",
            "jointt",
            r"^algorithm='jointt' is unknown \(did you mean joint\?\); known are aimet, alds, .*joint, joint_cut",
        ),
        ("decomposer", "svd", "^decomposer='svd' is unknown; known are best_view, pivoted, scaled, svd_channel"),
        ("algorithm", spectrim.Truncation, r"^algorithm=Truncation is a class; pass an instance, Truncation\(…\)$"),
        ("decomposer", spectrim.SVD, "^decomposer=SVD is a class; pass an instance"),
        ("algorithm", spectrim.SVD(), "^algorithm=.* is no algorithm; pass an instance or its name$"),
        ("decomposer", 3, "^decomposer=3 is no decomposer; pass an instance or its name$"),
        ("algorithm", "probe", "^algorithm=Probe measures and compresses nothing; call "),
        ("loss", 3, "^loss=3 is not loss"),
        ("resume", True, "^resume=True is no folder; give its name, or leave it out$"),
        ("loss", nn.CrossEntropyLoss, "^loss=CrossEntropyLoss is not loss"),
        ("algorithm", spectrim.Compact(verified=True), "^verification batches are missing; pass verification="),
        ("algorithm", spectrim.SVDTraining(), "^train batches are missing; pass train="),
        ("calibration", None, "^calibration batches are missing; pass calibration="),
        ("calibration", (X, X), r"^calibration= is one pair .*; give calibration=\[\(inputs, targets\)\]$"),
        ("calibration", [X, torch.zeros(8, dtype=torch.int64)], "^calibration= is one pair .*, and wants an iterable"),
        ("verification", [X, torch.zeros(8)], "^verification= is one pair "),
        ("calibration", [X, torch.zeros(8, 1)], "^calibration= is one pair "),
        ("calibration", [X.numpy(), torch.zeros(8).numpy()], "^calibration= is one pair "),
        ("calibration", [(X[0], torch.tensor(1))], "^the calibration split holds single samples, and wants batches; "),
    ],
)
def test_an_argument_of_the_wrong_kind_is_named_in_one_line(
    net: nn.Sequential, batches: Any, argument: str, value: Any, said: str
) -> None:
    with pytest.raises(spectrim.UserError, match=said) as refusal:
        spectrim.compress(net, **{"calibration": batches, argument: value})
    assert "\n" not in str(refusal.value)


def test_layers_that_the_user_names_stay_dense(net: nn.Sequential, batches: Any) -> None:
    for algorithm in (spectrim.Truncation(rank=2), "joint", "evbmf"):
        result = spectrim.compress(net, calibration=batches, algorithm=algorithm, exclude=["0", "re:8$"])
        assert set(result.plan) <= {"3", "6"} and result.plan
        named = [note for note in result.notes if ": left dense: exclude= names it" in note]
        assert [note[0] for note in named] == ["0", "8"]
        only = spectrim.compress(net, calibration=batches, algorithm=spectrim.Truncation(rank=2), include=["6"])
        assert list(only.plan) == ["6"]
    with pytest.raises(spectrim.UserError, match="^exclude: 'fc' matches no module of this model"):
        spectrim.compress(net, calibration=batches, exclude=["fc"])
    with pytest.raises(spectrim.UserError, match="^this model has nothing to factor: .*exclude= names it"):
        spectrim.compress(net, calibration=batches, exclude=["*"])


BUDGETED: Any = [
    spectrim.Truncation(params_kept=0.6),
    spectrim.Joint(params_kept=0.6, samples=30),
    spectrim.Joint(macs_kept=0.6, samples=30),
    GlobalThreshold(params_kept=0.6),
    "knapsack",
    "alds",
]


@pytest.mark.parametrize("algorithm", BUDGETED, ids=str)
def test_a_rank_that_the_user_sets_counts_in_the_budget(net: nn.Sequential, batches: Any, algorithm: Any) -> None:
    result = spectrim.compress(net, calibration=batches, algorithm=algorithm, overrides={"6": 3, "8": 2})
    assert result.plan["6"].rank == 3 and result.plan["8"].rank == 2
    report = result.report.set_index("layer")
    pivoted = result.plan["6"].form == PivotedForm("linear")
    assert report["rank"]["6"] == 3 and report["params_after"]["6"] == 3 * (256 + 24 - 3 * pivoted)
    assert pivoted == (isinstance(algorithm, spectrim.Joint) or algorithm == "knapsack")
    free = spectrim.compress(net, calibration=batches, algorithm=algorithm)
    asked = "macs_kept" if getattr(algorithm, "macs_kept", None) else "params_kept"
    assert getattr(result, asked) <= getattr(algorithm, asked, 0.5) and getattr(free, asked) > 0.3


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"fc": 2}, "^overrides: 'fc' is no layer of this model"),
        ({"1": 2}, "^overrides: '1' cannot be factored: it is no layer with a matrix"),
        ({"8": 5}, r"^overrides\['8'\]=5 is above 4, the largest rank at which it gets smaller"),
        ({"8": 0}, r"^overrides\['8'\]=0 is not a rank; give a whole number of at least 1"),
    ],
)
def test_a_rank_that_cannot_be_is_refused(net: nn.Sequential, batches: Any, overrides: Any, said: str) -> None:
    with pytest.raises(spectrim.UserError, match=said):
        spectrim.compress(net, calibration=batches, algorithm=spectrim.Truncation(rank=2), overrides=overrides)


def test_a_training_keeps_a_rank_that_the_user_sets(net: nn.Sequential, batches: Any) -> None:
    recipe = spectrim.Recipe(epochs=1, lr=0.01, precision="float32")
    algorithm = spectrim.SVDTraining(recipe=recipe, epsilon=0.1, delta_step=0.1)
    result = spectrim.compress(net, calibration=batches, train=batches, algorithm=algorithm, overrides={"6": 3})
    assert result.plan["6"].rank == 3 and result.model[6].rank == 3
    assert not torch.equal(result.model[6].bias, net[6].bias)


def test_a_plan_is_followed(net: nn.Sequential, batches: Any) -> None:
    joint = spectrim.compress(net, calibration=batches, algorithm=spectrim.Joint(params_kept=0.6, refit=0, samples=30))
    again = spectrim.compress(net, calibration=batches, plan=joint.plan)
    assert again.plan == joint.plan
    x = batches[0][0]
    assert torch.equal(logits(again.model, x), logits(joint.model, x))
    by_hand = spectrim.compress(net, plan={"6": 3, "0": 2})
    assert {name: kept.rank for name, kept in by_hand.plan.items()} == {"6": 3, "0": 2}
    read = spectrim.RankPlan.from_json(joint.plan.to_json())
    assert spectrim.compress(net, calibration=batches, plan=read).plan == joint.plan


def test_a_size_alone_of_a_decoder_is_what_the_command_line_takes_for_text() -> None:
    cut, decomposer = _chosen(0.8, None, None, token_loss)
    assert cut == spectrim.Joint(params_kept=0.8, samples=500, significance="auto", refit=0)
    assert decomposer == named("decomposer", "two_sided_tied") == _chosen(None, None, "joint_cut", token_loss)[1]
    for loss in (F.cross_entropy, label_loss, span_loss):  # an encoder is refitted
        assert _chosen(0.8, None, None, loss) == (spectrim.Joint(params_kept=0.8), PIVOTED)


def test_a_size_alone_is_joint_selection_with_its_own_decomposer(net: nn.Sequential, batches: Any) -> None:
    short = spectrim.compress(net, calibration=batches, params_kept=0.5)
    best = BestView(spectrim.WhitenedSVD(factors="pivoted"))
    long = spectrim.compress(net, calibration=batches, algorithm=spectrim.Joint(params_kept=0.5), decomposer=best)
    assert short.plan == long.plan and short.params_kept <= 0.5
    assert {type(kept.form) for kept in short.plan.values()} == {PivotedForm}
    plain = spectrim.compress(
        net, calibration=batches, algorithm=spectrim.Joint(params_kept=0.5), decomposer="svd_channel"
    )
    assert {type(kept.form) for kept in plain.plan.values()} == {PlainForm}
    with pytest.raises(spectrim.UserError, match="^params_kept= and algorithm= each say what to keep"):
        spectrim.compress(net, calibration=batches, params_kept=0.5, algorithm=spectrim.Joint(params_kept=0.4))


@pytest.mark.parametrize("name", ["joint", "knapsack", "truncation", "truncation_params", "zero_sum", "swift_svd"])
def test_a_size_with_the_name_of_an_algorithm_is_its_size(net: nn.Sequential, batches: Any, name: str) -> None:
    """All else is as the command line has it."""
    found = spectrim.compress(net, calibration=batches, params_kept=0.6, algorithm=name)
    own = {"ratio": None} if name == "truncation" else {}  # the rule that its file sets
    alike = replace(named("algorithm", name), **own, params_kept=0.6)
    decomposer = decomposer_for(name)
    by_hand = spectrim.compress(net, calibration=batches, algorithm=alike, decomposer=decomposer)
    assert found.plan == by_hand.plan and found.params_kept <= 0.6


def test_a_size_with_an_algorithm_that_meets_none_is_refused(net: nn.Sequential, batches: Any) -> None:
    with pytest.raises(spectrim.UserError, match="^algorithm='lossless' meets no size: leave out params_kept="):
        spectrim.compress(net, calibration=batches, params_kept=0.5, algorithm="lossless")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"plan": {"1": 2}}, "^plan: '1' cannot be factored: there is no such layer"),
        ({"plan": {"3": 2}, "exclude": ["3"]}, "^plan: '3' cannot be factored: left dense: exclude= names it"),
        ({"plan": {"8": 5}}, r"^plan\['8'\]: rank 5 is above 4, the largest that makes it smaller"),
        ({"plan": {"8": 1.5}}, r"^plan\['8'\]=1.5 is not a rank"),
        ({"plan": 3}, "^plan=3 is no plan"),
        ({"plan": {"8": 2}, "algorithm": "joint"}, "^plan= and algorithm= each say what to keep; pass one of them"),
    ],
)
def test_a_plan_that_cannot_be_followed_is_refused(net: nn.Sequential, batches: Any, given: Any, said: str) -> None:
    with pytest.raises(spectrim.UserError, match=said):
        spectrim.compress(net, calibration=batches, **given)


def test_a_plan_of_another_decomposer_names_the_form(net: nn.Sequential, batches: Any) -> None:
    spatial = spectrim.compress(
        net, calibration=batches, algorithm=spectrim.Truncation(rank=2), decomposer=spectrim.SVD("spatial")
    )
    with pytest.raises(spectrim.UserError, match=r"^plan\['0'\] is of form 'spatial'; .* this one gives 'channel'"):
        spectrim.compress(net, calibration=batches, plan=spatial.plan)
    assert spectrim.compress(net, plan=spatial.plan, decomposer="svd_spatial").plan == spatial.plan


class Remembering(nn.Module):
    """Keeps activations on itself, in a container and from a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.seen = nn.Linear(32, 64), nn.Linear(64, 10), dict[str, Tensor]()
        self.head.register_forward_pre_hook(lambda module, inputs: self.seen.update(head=inputs[0]))

    def forward(self, x: Tensor) -> Tensor:
        self.features = [torch.relu(self.body(x))]
        return self.head(self.features[0])


@pytest.mark.parametrize(
    "algorithm",
    [
        "lossless",
        "compact_verified",
        "joint",
        "rank_selection",
        "truncation",
        spectrim.SVDTraining(spectrim.Recipe(epochs=1, lr=0.01)),
        spectrim.FineTuning(spectrim.Compact(gamma=None, tolerance=1e9), spectrim.Recipe(epochs=1, lr=0.01)),
    ],
    ids=str,
)
def test_a_model_may_keep_its_activations(algorithm: Any) -> None:
    model, batches = Remembering(), [(X, torch.randint(10, (8,)))]
    model(X)
    result = spectrim.compress(model, calibration=batches, verification=batches, train=batches, algorithm=algorithm)
    assert model.features[0].requires_grad  # what the user's own pass has left there
    assert isinstance(result.report, pd.DataFrame) and logits(result.model, X).shape == (8, 10)
    copy.deepcopy(result.model)


TUNED = spectrim.FineTuning(spectrim.Truncation(rank=2), spectrim.Recipe(epochs=1, lr=0.01))


@pytest.mark.parametrize("algorithm", [None, "joint", "truncation", TUNED])
def test_inference_mode_changes_nothing(net: nn.Sequential, batches: Any, algorithm: Any) -> None:
    outside = spectrim.compress(net, calibration=batches, train=batches, algorithm=algorithm)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():  # also the batches are made here, and the report is read
            made = [(inputs.clone(), targets.clone()) for inputs, targets in batches]
            inside = spectrim.compress(net, calibration=made, train=made, algorithm=algorithm)
            assert inside.report.equals(outside.report)
            assert all(map(torch.equal, inside.model.parameters(), outside.model.parameters()))


@pytest.mark.parametrize("algorithm", [None, "joint", "truncation"])
def test_a_model_made_in_inference_mode_is_refused(net: nn.Sequential, batches: Any, algorithm: Any) -> None:
    with torch.inference_mode():
        made = copy.deepcopy(net)
    for mode in (False, True):
        with (
            torch.inference_mode(mode),
            pytest.raises(spectrim.UserError, match=r"^0.weight of the model was made inside of torch.inference_mode"),
        ):
            spectrim.compress(made, calibration=batches, algorithm=algorithm)


@pytest.mark.parametrize("made_inside", [False, True])
@pytest.mark.parametrize("loaded_inside", [False, True])
@pytest.mark.parametrize("more", [{}, {"params_kept": 0.6}, {"params_kept": 0.6, "calibration": True}])
def test_a_model_is_loaded_wherever_it_was_made(
    net: nn.Sequential, batches: Any, tmp_path: Path, made_inside: bool, loaded_inside: bool, more: dict[str, Any]
) -> None:
    joint = spectrim.Joint(params_kept=0.6, samples=16, refit=16)
    spectrim.compress(net, calibration=batches, algorithm=joint).save(tmp_path / "net", every_size=bool(more))
    more = more | ({"calibration": batches} if "calibration" in more else {})
    expected = spectrim.load(tmp_path / "net", into=copy.deepcopy(net), **more)
    with torch.inference_mode(made_inside):
        into = copy.deepcopy(net)
    with torch.inference_mode(loaded_inside):
        loaded = spectrim.load(tmp_path / "net", into=into, **more)
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value)


def test_a_loader_that_does_not_begin_anew_is_said(net: nn.Sequential, batches: Any) -> None:
    class Once:
        def __init__(self) -> None:
            self.left = iter(batches)

        def __iter__(self) -> Any:
            return self.left

    with pytest.raises(
        spectrim.UserError, match="calibration split can be read only once; .* the same iterator at each pass"
    ):
        spectrim.compress(net, calibration=Once(), algorithm="joint")


def test_a_selection_that_factors_nothing_says_so(net: nn.Sequential, batches: Any) -> None:
    for verified in (False, True):
        chosen = spectrim.Lossless(gamma=1e-9, verified=verified)
        result = spectrim.compress(net, calibration=batches, verification=batches, algorithm=chosen)
        assert result.notes[-1].startswith("no layer is factored: 0 of 4 layers have a rank within gamma=1e-09")
    result = spectrim.compress(net, calibration=batches, algorithm=spectrim.Lossless(gamma=1e-9), overrides={"6": 3})
    assert list(result.plan) == ["6"] and not any("no layer is factored" in note for note in result.notes)


def test_the_module_of_language_models_is_an_attribute() -> None:
    assert spectrim.language.__name__ == "spectrim.language"
