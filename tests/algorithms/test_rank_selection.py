"""One threshold for all layers: the last that passed, on what is returned, in few evaluations."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.algorithms.rank_selection import RankSelection, rank_at, singular_values
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.spectrum import Spectrum
from spectrim.decomposers.svd import SVD
from spectrim.decomposers.whitened import WhitenedSVD
from spectrim.errors import UserError
from spectrim.statistics.objective import Evaluation, Objective

Batches = list[tuple[Tensor, Tensor]]


class Counting(Objective):
    """Counts its evaluations and keeps the parameters of what was evaluated."""

    seen: list[tuple[int, ...]]

    def evaluate(self, model: nn.Module, split: str = "calibration") -> Evaluation:
        self.seen = [*getattr(self, "seen", []), tuple(p.numel() for p in model.parameters())]
        return super().evaluate(model, split)


def select(net: nn.Module, objective: Objective, view: Any = "channel", **given: Any) -> Compressed:
    return RankSelection(**given).compress(net, SVD(view), objective)


@pytest.fixture
def sharp(net: nn.Sequential) -> nn.Sequential:
    """Singular values that fall fast, so that there is something to select, and logits that feel it."""
    for layer in (net[0], net[3], net[6], net[8]):
        factors = SVD().spectrum(layer).svd
        S_R = factors.S_R[:, :1] * 0.6 ** torch.arange(factors.S_R.shape[-1])
        layer.weight.data = (factors.U_OR * S_R[:, None] @ factors.Vh_RI).reshape(layer.weight.shape).float()
    for layer in (net[3], net[6], net[8]):
        layer.weight.data *= 6
    return net


def passed(compressed: Compressed) -> dict[str, Any]:
    return max((step for step in compressed.log if step["passed"]), key=lambda step: step["delta"])


def expected_plan(net: nn.Sequential, delta: float) -> dict[str, int]:
    """The definition, layer by layer: singular values of all groups, at least one, dense above break-even."""
    ranks = {}
    for name in ("0", "3", "6", "8"):
        layer = net.get_submodule(name)
        groups = getattr(layer, "groups", 1)
        matrices = layer.weight.detach().double().reshape(groups, len(layer.weight) // groups, -1)
        sigma = torch.linalg.svdvals(matrices).amax(0)
        rank = max([k + 1 for k in range(len(sigma)) if sigma[k] / sigma[0] >= delta] or [1])
        if rank * groups * sum(matrices.shape[1:]) < layer.weight.numel():
            ranks[name] = rank
    return ranks


@pytest.mark.parametrize("epsilon", [0.003, 0.05, 0.5])
@pytest.mark.parametrize("view", ["channel", "spatial"])
def test_what_is_returned_is_what_passed_last(
    sharp: nn.Sequential, objective: Objective, epsilon: float, view: Any
) -> None:
    result = select(sharp, objective, view, epsilon=epsilon)
    chosen = passed(result)
    dense = objective.evaluate(sharp).loss
    assert objective.evaluate(result.model).loss == pytest.approx(chosen["loss"], abs=1e-6)
    assert abs(chosen["loss"] - dense) < epsilon
    assert result.params_kept == pytest.approx(chosen["params_kept"])
    assert result.log[0] == {"delta": 0, "loss": dense, "passed": True, "rank_kept": 1, "params_kept": 1}
    for step in result.log:
        assert step["passed"] == (abs(step["loss"] - dense) < epsilon)
    if view == "channel":
        assert {name: kept.rank for name, kept in result.plan.items()} == expected_plan(sharp, chosen["delta"])


def test_something_is_selected_and_more_where_more_is_allowed(sharp: nn.Sequential, objective: Objective) -> None:
    kept = [select(sharp, objective, epsilon=epsilon).params_kept for epsilon in (1e-9, 1e-3, 0.01, 1e9)]
    assert 1 == kept[0] > kept[1] > kept[2] > kept[3]


def test_the_bracket_closes_around_delta(sharp: nn.Sequential, objective: Objective) -> None:
    result = select(sharp, objective, epsilon=0.05, delta_step=0.01)
    low = passed(result)["delta"]
    high = min([step["delta"] for step in result.log if not step["passed"]])
    assert 0 < high - low <= 0.01
    deltas = [step["delta"] for step in result.log[1:]]
    assert deltas[0] == 0.5
    moves = [abs(after - before) for before, after in itertools.pairwise(deltas)]
    assert moves == [2.0**-step for step in range(2, len(deltas) + 1)]


@pytest.mark.parametrize("delta_step", [0.9, 0.5, 0.25, 0.1, 1e-3, 2.0**-12])
def test_few_evaluations_and_none_of_a_model_already_seen(
    sharp: nn.Sequential, batches: Batches, delta_step: float
) -> None:
    objective = Counting(F.cross_entropy, {"calibration": batches})
    result = select(sharp, objective, epsilon=0.05, delta_step=delta_step)
    assert len(result.log) == math.ceil(math.log2(1 / delta_step)) + 1
    assert len(objective.seen) == len(set(objective.seen)) <= len(result.log)


def test_every_layer_is_decomposed_once(
    sharp: nn.Sequential, objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    decomposed = []
    spectrum = SVD.spectrum
    monkeypatch.setattr(SVD, "spectrum", lambda *given: decomposed.append(given) or spectrum(*given))
    select(sharp, objective, epsilon=0.05)
    assert len(decomposed) == 4


def test_delta_0_keeps_the_model_where_nothing_else_passes(net: nn.Sequential, objective: Objective) -> None:
    result = select(net, objective, epsilon=1e-12)
    assert not result.plan and result.params_kept == 1
    for name, value in result.model.state_dict().items():
        assert value.equal(net.state_dict()[name])


def test_a_loss_that_falls_too_far_does_not_pass_either(sharp: nn.Sequential, batches: Batches) -> None:
    """S2 asks for |change| < epsilon: truncation may not help either."""
    flipped = Objective(lambda out, y: -F.cross_entropy(out, y), {"calibration": batches})
    upright = Objective(F.cross_entropy, {"calibration": batches})
    first, second = (select(sharp, one, epsilon=0.05) for one in (upright, flipped))
    assert [step["passed"] for step in first.log] == [step["passed"] for step in second.log]
    assert not all(step["passed"] for step in first.log)


def test_a_relative_epsilon_is_a_fraction_of_the_dense_loss(sharp: nn.Sequential, batches: Batches) -> None:
    objective = Objective(lambda out, y: 10 * F.cross_entropy(out, y), {"calibration": batches})
    dense = objective.evaluate(sharp).loss
    relative, absolute = (
        select(sharp, objective, epsilon=epsilon, relative=flag)
        for epsilon, flag in ((0.02, True), (0.02 * dense, False))
    )
    assert relative.plan == absolute.plan and relative.plan
    nothing = Objective(lambda out, y: 0 * F.cross_entropy(out, y), {"calibration": batches})
    with pytest.raises(UserError, match="a fraction of the dense loss, and that is 0"):
        select(sharp, nothing, epsilon=0.1, relative=True)


@pytest.mark.parametrize("subset", [1, 16, 20, 39])
def test_the_loss_is_that_of_the_first_samples(sharp: nn.Sequential, batches: Batches, subset: int) -> None:
    objective = Objective(F.cross_entropy, {"calibration": batches})
    x, y = torch.cat([x for x, _ in batches])[:subset], torch.cat([y for _, y in batches])[:subset]
    first = Objective(F.cross_entropy, {"calibration": [(x, y)]})
    result = select(sharp, objective, epsilon=0.03, subset=subset)
    assert result.log[0]["loss"] == pytest.approx(first.evaluate(sharp).loss, rel=1e-5)
    assert passed(result)["loss"] == pytest.approx(first.evaluate(result.model).loss, rel=1e-5)


def test_inputs_and_targets_of_any_structure_are_cut(sharp: nn.Sequential, batches: Batches) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = sharp

        def forward(self, images: Tensor) -> Tensor:
            return self.net(images)

    named = [({"images": x}, {"labels": y}) for x, y in batches]
    objective = Objective(lambda out, y: F.cross_entropy(out, y["labels"]), {"calibration": named})
    plain = Objective(F.cross_entropy, {"calibration": batches})
    result = select(Named(), objective, epsilon=0.03, subset=20)
    assert result.log == select(sharp, plain, epsilon=0.03, subset=20).log


def test_a_subset_is_read_once_from_a_loader_that_shuffles(sharp: nn.Sequential) -> None:
    class Shuffling(list):
        def __iter__(self) -> Any:
            order = torch.randperm(len(self))
            return iter([self[int(place)] for place in order])

    batches = Shuffling([(torch.randn(4, 3, 8, 8), torch.randint(5, (4,))) for _ in range(10)])
    result = select(sharp, Objective(F.cross_entropy, {"calibration": batches}), epsilon=1e-9, subset=8)
    same = {step["params_kept"]: step["loss"] for step in result.log}
    assert all(step["passed"] for step in result.log if step["params_kept"] == 1) and same[1.0] == result.log[0]["loss"]


def test_the_split_is_the_one_that_is_asked_for(sharp: nn.Sequential, objective: Objective) -> None:
    result = select(sharp, objective, epsilon=0.03, split="train")
    assert result.log[0]["loss"] == objective.evaluate(sharp, "train").loss != objective.evaluate(sharp).loss
    calibration = Objective(F.cross_entropy, {"calibration": objective.splits["calibration"]})
    with pytest.raises(UserError, match="^train batches are missing; pass train="):
        select(sharp, calibration, split="train")


def test_bad_samples_are_refused(net: nn.Sequential, batches: Batches) -> None:
    with pytest.raises(UserError, match="subset=100 is more than the 39 samples of the calibration split"):
        select(net, Objective(F.cross_entropy, {"calibration": batches}), subset=100)
    with pytest.raises(UserError, match="the calibration split is empty"):
        select(net, Objective(F.cross_entropy, {"calibration": []}))
    with pytest.raises(UserError, match="the train split is empty"):
        select(net, Objective(F.cross_entropy, {"calibration": batches, "train": []}), split="train")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": 0.0}, "epsilon, a change of the loss, must be finite and above 0, got 0.0"),
        ({"epsilon": -1.0}, "must be finite and above 0, got -1.0"),
        ({"epsilon": math.nan}, "must be finite and above 0, got nan"),
        ({"epsilon": math.inf}, "must be finite and above 0, got inf"),
        ({"epsilon": "small"}, "epsilon='small' is not of type float"),
        ({"delta_step": 0.0}, r"delta_step must lie in \(0, 1\), got 0.0"),
        ({"delta_step": 1.0}, r"delta_step must lie in \(0, 1\), got 1.0"),
        ({"subset": 0}, "subset must be at least 1 sample"),
        ({"split": "test"}, "split='test' is none of: 'calibration', 'train'"),
        ({"delta": "guess"}, "delta='guess' is none of: 'bisect', 'theory'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        RankSelection(**settings)
    assert "\n" not in str(refusal.value)


def test_rank_at_is_the_largest_that_reaches_delta() -> None:
    S_R = torch.tensor([4.0, 2.0, 1.0, 0.0])
    assert [rank_at(S_R, delta) for delta in (0.0, 0.1, 0.25, 0.26, 0.5, 0.51, 1.0)] == [4, 3, 3, 2, 2, 1, 1]
    assert rank_at(torch.zeros(3), 0.5) == 3  # nothing tells the components of a zero weight apart: none is cut


def test_a_group_keeps_what_any_group_needs() -> None:
    layer = nn.Conv2d(4, 4, 1, groups=2, bias=False)
    layer.weight.data = torch.stack([torch.diag(torch.tensor(d)) for d in ([8.0, 1.0], [4.0, 3.0])]).view(4, 2, 1, 1)
    torch.testing.assert_close(singular_values("a", SVD().spectrum(layer)), torch.tensor([8.0, 3.0]).double())


def test_a_whitened_weight_is_cut_by_its_own_singular_values(sharp: nn.Sequential, objective: Objective) -> None:
    result = RankSelection(epsilon=0.05).compress(sharp, WhitenedSVD("channel", samples=39), objective)
    delta = passed(result)["delta"]
    bench = Workbench.of(sharp, WhitenedSVD("channel", samples=39), objective)
    for name, kept in result.plan.items():
        importance = bench.spectra[name].importance.amax(0)
        assert importance[kept.rank - 1] >= delta * importance[0] > importance[kept.rank]
    assert result.plan and objective.evaluate(result.model).loss == pytest.approx(passed(result)["loss"], abs=1e-6)


def test_a_spectrum_without_singular_values_is_refused(net: nn.Sequential) -> None:
    class Cores(Spectrum):
        max_rank, break_even = 3, 2
        error = largest_entry = first_order = sizes = factor = kept = None  # type: ignore[assignment]

    with pytest.raises(UserError, match="layer 0: rank selection needs singular values; Cores has none"):
        singular_values("0", Cores())
