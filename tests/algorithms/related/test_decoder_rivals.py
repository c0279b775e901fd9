"""Each method for decoders has the property that its paper states, in the plain and in the pivoted form."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spectrim.algorithms.refitted import Refitted
from spectrim.algorithms.related.lems import LEMS
from spectrim.algorithms.related.svd_llm_v2 import SVDLLMv2, errors_of_all, removed_parts
from spectrim.algorithms.related.swift_svd import SwiftSVD
from spectrim.algorithms.related.zero_sum import ZeroSum, in_order
from spectrim.algorithms.shared.divergence import divergences
from spectrim.algorithms.shared.layer_types import by_type
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.algorithms.truncation import Truncation
from spectrim.decomposers.matrix import MatrixSpectrum
from spectrim.decomposers.svd import SVD
from spectrim.decomposers.two_sided import TwoSidedSVD
from spectrim.decomposers.whitened import WhitenedSVD
from spectrim.errors import UserError
from spectrim.statistics.objective import Objective
from spectrim.surgery import replacing

RIVALS: Any = [SVDLLMv2, SwiftSVD, LEMS, ZeroSum]
FORMS = ["plain", "pivoted"]


@pytest.fixture
def blocks() -> nn.Sequential:
    """Four blocks of one layer each, whose spectra fall ever faster, and a head."""
    net = nn.Sequential()
    for place, decay in enumerate((0.95, 0.85, 0.7, 0.5)):
        layer = nn.Linear(16, 16)
        U, _, Vh = torch.linalg.svd(torch.randn(16, 16))
        layer.weight.data = 2 * U @ (decay ** torch.arange(16)).diag() @ Vh
        net.add_module(str(place), nn.Sequential(layer, nn.ReLU()))
    return net.append(nn.Linear(16, 4))


@pytest.fixture
def data() -> Objective:
    return Objective(F.cross_entropy, {"calibration": [(torch.randn(60, 16), torch.arange(60) % 4)]})


@pytest.mark.parametrize("factors", FORMS)
@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("budget", [{"params_kept": 0.6}, {"params_kept": None, "macs_kept": 0.6}], ids=str)
def test_meets_its_budget_from_below(
    rival: Any, factors: Any, budget: dict, blocks: nn.Sequential, data: Objective
) -> None:
    for decomposer in (WhitenedSVD("channel", samples=60, factors=factors), TwoSidedSVD("channel", factors=factors)):
        result = rival(**budget).compress(blocks, decomposer, data)
        kept = result.params_kept if budget["params_kept"] else result.macs_kept
        assert 0.6 - 4 * 32 / 1088 < kept <= 0.6  # within one rank of all blocks


@pytest.mark.parametrize("rival", RIVALS)
def test_bad_settings_are_one_line(rival: Any, blocks: nn.Sequential, data: Objective) -> None:
    with pytest.raises(UserError, match="must lie in"):
        rival(params_kept=1.0)
    with pytest.raises(UserError, match="out of reach"):
        rival(params_kept=0.01).compress(blocks, WhitenedSVD("channel"), data)


def test_layers_are_of_one_type_by_name_and_shape(blocks: nn.Sequential) -> None:
    names = ["0.0", "1.0", "2.0", "3.0", "4"]
    assert by_type(blocks, names) == [names[:4], names[4:]]
    block = nn.ModuleDict({"q": nn.Linear(3, 3), "k": nn.Linear(3, 3)})
    assert by_type(nn.ModuleList([block, block]), ["0.q", "0.k", "1.q", "1.k"]) == [["0.q", "1.q"], ["0.k", "1.k"]]


def test_svd_llm_v2_removes_less_where_truncation_loses_more_and_the_target_on_average() -> None:
    parts = removed_parts({"a": 10.0, "b": 100.0, "c": 10_000.0}, 0.2)
    assert parts["a"] == pytest.approx(2 * parts["b"]) and parts["a"] == pytest.approx(4 * parts["c"])
    assert sum(parts.values()) / 3 == pytest.approx(0.2)
    assert removed_parts({"a": 5.0, "b": 5.0}, 0.3) == {"a": pytest.approx(0.3), "b": pytest.approx(0.3)}
    assert removed_parts({"a": 0.0, "b": 1e4}, 0.3)["a"] < 1 == removed_parts({"a": 0.0, "b": 1e4}, 0.9)["a"]


def test_the_error_of_svd_llm_v2_is_that_of_all_calibration_outputs(blocks: nn.Sequential, data: Objective) -> None:
    bench = Workbench.of(blocks, WhitenedSVD("channel", samples=10**6), data)
    x = torch.cat([inputs for inputs, _ in data.given("calibration")])
    with torch.no_grad():
        by_hand = (bench.trial({"0.0": 2})[0][0](x) - blocks[0][0](x)).norm()
    assert float(errors_of_all(bench)["0.0"][2]) == pytest.approx(float(by_hand), rel=1e-3)


def test_svd_llm_v2_keeps_more_of_the_layer_with_the_flatter_spectrum(blocks: nn.Sequential, data: Objective) -> None:
    result = SVDLLMv2(params_kept=0.6).compress(blocks, WhitenedSVD("channel", factors="pivoted"), data)
    ranks = result.report.set_index("layer")["rank"].fillna(16)
    assert ranks["0.0"] > ranks["3.0"]


def test_swift_svd_reserves_a_part_of_the_uniform_rank(blocks: nn.Sequential, data: Objective) -> None:
    decomposer = WhitenedSVD("channel", factors="pivoted")
    uniform = Truncation(params_kept=0.6).compress(blocks, decomposer, data).plan
    reserved = SwiftSVD(params_kept=0.6, reserve=1.0).compress(blocks, decomposer, data).plan
    assert {name: kept.rank for name, kept in reserved.items()} == {name: kept.rank for name, kept in uniform.items()}
    half, none = (
        SwiftSVD(params_kept=0.6, reserve=part, weight=1.0).compress(blocks, decomposer, data) for part in (0.5, 0.0)
    )
    own, free = (result.report.set_index("layer")["rank"].fillna(16) for result in (half, none))
    assert (own[list(uniform)] >= min(kept.rank for kept in uniform.values()) // 2).all()
    assert own.max() - own.min() <= free[own.index].max() - free.min()  # nearer to uniform


def test_the_divergence_is_that_of_the_model_with_one_layer_cut(blocks: nn.Sequential, data: Objective) -> None:
    bench = Workbench.of(blocks, WhitenedSVD("channel", samples=60), data)
    moved, (x, _) = divergences(bench, {"0.0": 2, "3.0": 2}, 60), next(iter(data.given("calibration")))
    for name in ("0.0", "3.0"):
        cut = replacing.apply(blocks, replacing.plan_of(bench.spectra, {name: 2}), bench.spectra)
        p, q = blocks(x).log_softmax(-1), cut(x).log_softmax(-1)
        assert moved[name] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean().detach()), rel=1e-4)
    assert moved["0.0"] > moved["3.0"] > 0
    assert divergences(bench, {"0.0": 2, "3.0": 2}, 60) == moved and data.read["calibration"] == 60 + 180
    pairs = Objective(F.mse_loss, {"calibration": [(torch.randn(9, 16), torch.randn(9, 4))]})
    with pytest.raises(UserError, match="class scores"):
        SwiftSVD(params_kept=0.6).compress(blocks, WhitenedSVD("channel"), pairs)


def test_a_layer_is_factored_once_for_all_batches(blocks: nn.Sequential, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [(torch.randn(20, 16), torch.arange(20) % 4) for _ in range(3)]
    bench = Workbench.of(blocks, SVD(), Objective(F.cross_entropy, {"calibration": batches}))
    factor, ranks = MatrixSpectrum.factor, list[Any]()
    monkeypatch.setattr(MatrixSpectrum, "factor", lambda own, keep: ranks.append(keep) or factor(own, keep))
    divergences(bench, {"0.0": 2, "3.0": 3}, 60)
    assert ranks == [2, 3]


def test_lems_lets_early_layers_lose_less_by_the_depth_factor(data: Objective) -> None:
    layer = nn.Linear(16, 16)
    net = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(4)), nn.Linear(16, 4))
    for block in list(net)[:4]:
        block[0].load_state_dict(layer.state_dict())  # type: ignore[index]
    decomposer = WhitenedSVD("channel", factors="pivoted")
    flat, deep = (
        LEMS(params_kept=0.6, depth=depth).compress(net, decomposer, data).report.set_index("layer")["rank"].fillna(16)
        for depth in (0.0, 50.0)
    )
    assert deep["0.0"] >= flat["0.0"] and deep["3.0"] <= flat["3.0"] and not deep.equals(flat)


def test_lems_predicts_the_measurement_at_its_point_and_keeps_the_floor(blocks: nn.Sequential, data: Objective) -> None:
    decomposer = TwoSidedSVD("channel", factors="pivoted")
    result = LEMS(params_kept=0.5, floor=0.3).compress(blocks, decomposer, data)
    report = result.report.dropna(subset="rank")
    bench = Workbench.of(blocks, decomposer, data)
    for name, rank in zip(report["layer"], report["rank"], strict=True):
        assert rank >= max(1, bench.spectra[name].rank_within(0.3 * bench.params_of(name)))
    moved = divergences(bench, {entry["layer"]: entry["rank"] for entry in result.log}, 100)
    assert {entry["layer"]: entry["divergence"] for entry in result.log} == moved


def test_the_first_order_changes_of_zero_sum_cancel() -> None:
    changes = {name: torch.randn(40).tolist() for name in "abc"}
    curves = {name: [*torch.tensor(own).flip(0).cumsum(0).flip(0).tolist(), 0.0] for name, own in changes.items()}
    removals = in_order(curves)
    assert len(removals) == 3 * 39  # rank 1 is left of each
    for name in "abc":
        assert [one.rank for one in removals if one.layer == name] == list(range(39, 0, -1))  # the smallest first
    largest = max(abs(one.change) for one in removals)
    left = dict.fromkeys("abc", 40)
    for before, one in zip([None, *removals], removals, strict=False):
        total = before.total if before else 0.0
        signs = {changes[name][rank - 1] >= 0 for name, rank in left.items() if rank > 1}
        if len(signs) == 2:  # both could be had: the sum turns back towards zero
            assert abs(one.total) <= max(abs(total), largest) and (one.change >= 0) == (total <= 0)
        left[one.layer] -= 1
    everything = sum(one.change for one in removals)
    assert removals[-1].total == pytest.approx(everything)


@pytest.mark.parametrize("kept", [0.6, 0.9])
@pytest.mark.parametrize("factors", FORMS)
def test_zero_sum_predicts_the_change_of_the_model_that_it_returns(
    kept: float, factors: Any, blocks: nn.Sequential, data: Objective
) -> None:
    result = ZeroSum(params_kept=kept).compress(blocks, WhitenedSVD("channel", factors=factors), data)
    (entry,) = result.log
    assert result.predicted_change == pytest.approx(entry["predicted"], abs=1e-5)
    assert abs(entry["predicted"]) <= entry["largest_sum"]


@pytest.mark.parametrize("factors", FORMS)
def test_aa_svd_reaches_the_best_of_its_rank_on_the_inputs_of_the_compressed_model(
    factors: Any, blocks: nn.Sequential, data: Objective
) -> None:
    """AA-SVD: ``min ||W X - W' X'||`` over the rank, with X' the inputs that the layers before leave in place of X."""
    decomposer = WhitenedSVD("channel", samples=60, factors=factors)
    selector = Truncation(params_kept=0.6)
    cut = selector.compress(blocks, decomposer, data)
    fitted = Refitted(selector, samples=60).compress(blocks, decomposer, data)
    x = next(iter(data.given("calibration")))[0]
    for place in range(1, 4):
        name = f"{place}.0"
        before, now = (model[:place](x).detach().double() for model in (blocks, fitted.model))  # type: ignore[index]
        wanted = blocks.get_submodule(name)(before.float()).detach().double()
        wanted, now = wanted - wanted.mean(0), now - now.mean(0)
        U, S, _ = torch.linalg.svd(now, full_matrices=False)
        there = S.gt(1e-6 * S[0])
        reached = U[:, there].T @ wanted  # what some map of these inputs gives; a dead unit gives nothing
        energy = torch.linalg.svdvals(reached).square()
        best = float(wanted.square().sum() - energy[: fitted.plan[name].rank].sum())

        def lost(model: nn.Module, name: str = name, now: Any = now, wanted: Any = wanted) -> float:
            weight = model.get_submodule(name).weight.detach().double()  # type: ignore[operator, union-attr]
            return float((wanted - now @ weight.T).square().sum())

        assert best - 1e-6 < lost(fitted.model) < 1.15 * best  # the refit has a ridge
        assert lost(fitted.model) < lost(cut.model)
