"""What holds for every algorithm of ``conf/algorithm``, found by listing that folder: a new one is tested unasked."""

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from spectrim.algorithms.compact import Compact
from spectrim.algorithms.lossless import Lossless
from spectrim.algorithms.refitted import Refitted
from spectrim.algorithms.shared.compressed import Algorithm, Compressed
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.algorithms.truncation import Truncation
from spectrim.batches import evaluating
from spectrim.checkpoints import single_file
from spectrim.cli import run
from spectrim.decomposers.spectrum import Decomposer, content, spectrum_of
from spectrim.decomposers.subspaces import SubspaceSVD
from spectrim.decomposers.svd import SVD
from spectrim.decomposers.tucker2 import Tucker2
from spectrim.errors import UserError
from spectrim.factored.base import FactoredLayer
from spectrim.factored.forms import Form, PlainForm
from spectrim.records import records
from spectrim.runs import configuration, targets
from spectrim.statistics.batchnorm import SAMPLES, reestimate
from spectrim.statistics.objective import Objective
from spectrim.surgery import replacing
from spectrim.surgery.cost import parameters

ELSEWHERE = {"aimet"}  # runs in an environment of its own; its tests have a stand-in for the wheel
NAMES = sorted({path.stem for path in (Path(configuration.CONF) / "algorithm").glob("*.yaml")} - ELSEWHERE)
MEASUREMENTS = {"probe", "bound_probe"}  # which compress nothing; see test_every_measurement
VIEWS: Any = ("channel", "spatial")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
GREEDY = [  # whatever a user may ask for, as far as it goes
    Truncation(ratio=1.0),
    Truncation(energy=1.0),
    Truncation(params_kept=1.0),
    Truncation(rank=16),
    Compact(gamma=None, tolerance=1e9),
    Compact(gamma=None, verified=True, verify_on="calibration", verified_tolerance=1e9, tolerance=1e9, tries=99),
    Lossless(gamma=None, verified=True, verify_on="calibration", verified_tolerance=1e9, refresh=True),
]


@pytest.fixture(params=[name for name in NAMES if name not in MEASUREMENTS])
def algorithm(request: pytest.FixtureRequest, compose: Any, brief: Any) -> Algorithm:
    return brief(targets.build(configuration.plain(compose(f"algorithm={request.param}").algorithm)))


def trains(algorithm: Algorithm) -> bool:
    """Whether weights change beyond what a plan says."""
    return "recipe" in vars(algorithm) or getattr(algorithm, "refine", None) is not None


def refits(algorithm: Algorithm) -> bool:
    """Whether the factors are fitted to the outputs of the dense layers, and the means of BatchNorm with them."""
    return isinstance(algorithm, Refitted) or bool(getattr(algorithm, "refit", 0))


def untimed(log: list[dict]) -> list[dict]:
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in log]


def of_form(form: Form, view: Any) -> Decomposer:
    """The decomposer whose spectra have this form."""
    assert isinstance(form, PlainForm)
    return SubspaceSVD(form.subspaces, view) if form.subspaces > 1 else SVD(view)


def compressed_by(algorithm: Algorithm, net: nn.Sequential, objective: Objective, view: Any = "channel") -> Compressed:
    return algorithm.compress(net, SVD(view), objective)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_yields_a_record(compose: Any, digits: list[str], tmp_path: Path, name: str) -> None:
    cfg = compose(*digits, f"algorithm={name}", "data.calibration_size=50", "data.batch_size=25")
    if "evaluations" in cfg.algorithm:  # what a search does in a test, as in `brief`
        cfg.algorithm.evaluations = 3
    record = run.run(cfg)
    assert record["names"]["algorithm"] == name
    assert records.read_all(tmp_path, "runs") == [json.loads(json.dumps(record))]
    assert bool(record["layers"]) == (name not in MEASUREMENTS)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a caller could notice."""
    return {
        "values": copy.deepcopy(model.state_dict()),
        "modes": [module.training for module in model.modules()],
        "classes": [type(module) for module in model.modules()],
        "hooks": [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()],
        "places": [(p.data_ptr(), p.device, p.requires_grad) for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
    }


@pytest.mark.parametrize("view", VIEWS)
def test_the_given_model_is_untouched(
    algorithm: Algorithm, net: nn.Sequential, objective: Objective, view: Any
) -> None:
    net[1].eval()
    net[3].weight.requires_grad_(False)
    net[6].weight.grad = torch.ones_like(net[6].weight)
    net[8].register_forward_hook(lambda module, inputs, output: None)
    before = state_of(net)
    result = compressed_by(algorithm, net, objective, view)
    after = state_of(net)
    for part in ("values", "grads"):
        torch.testing.assert_close(after.pop(part), before.pop(part), rtol=0, atol=0)
    assert after == before
    assert torch.is_grad_enabled()
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in result.model.parameters()}


def laid_out(bench: Workbench) -> dict[str, Any]:
    """Everything that a workbench holds."""
    held = {field.name: getattr(bench, field.name) for field in dataclasses.fields(bench) if field.init}
    factors = [content(own.factor(own.max_rank).state_dict().values()) for own in bench.spectra.values()]
    return {**held, "spectra": dict(bench.spectra), "factors": factors}


def test_the_workbench_is_unchanged(
    algorithm: Algorithm, net: nn.Sequential, objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[Workbench, dict[str, Any]]] = []
    of = Workbench.of

    def noted(*given: Any) -> Workbench:
        bench = of(*given)
        opened.append((bench, laid_out(bench)))
        return bench

    monkeypatch.setattr(Workbench, "of", noted)
    compressed_by(algorithm, net, objective)
    assert opened
    for bench, before in opened:
        assert laid_out(bench) == before


def test_a_workbench_cannot_be_changed(net: nn.Sequential, objective: Objective) -> None:
    bench = Workbench.of(net, SVD(), objective)
    with pytest.raises(dataclasses.FrozenInstanceError):
        bench.timed_at = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        bench.spectra["0"] = bench.spectra["3"]  # type: ignore[index]
    with pytest.raises(AttributeError):
        bench.notes.append("a note")  # type: ignore[attr-defined]


@pytest.mark.parametrize("view", VIEWS)
def test_equal_settings_and_equal_plans_give_equal_models(
    algorithm: Algorithm, net: nn.Sequential, objective: Objective, view: Any
) -> None:
    first = compressed_by(algorithm, net, objective, view)
    second = compressed_by(algorithm, copy.deepcopy(net), objective, view)
    assert first.plan == second.plan and untimed(first.log) == untimed(second.log) and first.notes == second.notes
    pd.testing.assert_frame_equal(first.report, second.report)
    spectra = {
        name: spectrum_of(net.get_submodule(name), of_form(kept.form, view)) for name, kept in first.plan.items()
    }
    replayed = replacing.apply(net, first.plan, spectra)
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name])
        if "running_" not in name and not (
            trains(algorithm) or refits(algorithm)
        ):  # BatchNorm's statistics are the data's, not the plan's
            assert torch.equal(value, replayed.state_dict()[name])


@pytest.mark.parametrize("view", VIEWS)
def test_report_and_costs_agree_with_the_model(
    algorithm: Algorithm, net: nn.Sequential, objective: Objective, view: Any
) -> None:
    result = compressed_by(algorithm, net, objective, view)
    dense, small = (sum(p.numel() for p in model.parameters()) for model in (net, result.model))
    assert (result.dense_cost.params, result.cost.params) == (dense, small)
    assert result.params_kept == small / dense <= 1 and result.macs_kept > 0
    report = result.report
    assert report.columns.tolist() == [
        "layer",
        "shape",
        "full_rank",
        "break_even",
        "rank",
        "params_before",
        "params_after",
        "predicted_change",
        "relative_error",
    ]
    assert report["params_before"].sum() - report["params_after"].sum() == dense - small
    chosen = report.dropna(subset="rank").set_index("layer")["rank"]
    assert chosen.to_dict() == {name: kept.rank for name, kept in result.plan.items()}
    assert result.predicted_change == pytest.approx(report["predicted_change"].sum())


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("greedy", GREEDY, ids=str)
def test_no_layer_is_ever_factored_above_break_even(
    greedy: Algorithm, net: nn.Sequential, objective: Objective, view: Any
) -> None:
    result = compressed_by(greedy, net, objective, view)
    for name in result.plan:
        factored = result.model.get_submodule(name)
        assert factored.first.weight.numel() + factored.second.weight.numel() < net.get_submodule(name).weight.numel()
    assert result.params_kept <= 1


def test_no_listed_algorithm_factors_above_break_even(
    algorithm: Algorithm, net: nn.Sequential, objective: Objective
) -> None:
    report = compressed_by(algorithm, net, objective).report.dropna()
    assert (report["rank"] <= report["break_even"]).all() and (report["params_after"] < report["params_before"]).all()


class Sum(nn.Module):
    """Linear in every weight: three layers side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.left, self.right = nn.Conv2d(4, 6, 3, groups=2), nn.Linear(64, 24), nn.Linear(64, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x.flatten(1)) + self.right(x.flatten(1).flip(1)) + self.conv(x).flatten(1)


def doubles() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    model = Sum().double()
    batches = [(torch.randn(n, 4, 4, 4).double(), torch.randn(n, 24).double()) for n in (9, 4)]
    return model, batches


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("chosen", [Truncation(ratio=0.4), Lossless(gamma=None), Compact(gamma=None)], ids=str)
def test_a_linear_loss_of_a_linear_model_is_predicted_exactly(chosen: Algorithm, view: Any) -> None:
    model, batches = doubles()
    linear = Objective(lambda out, targets: (out * targets).sum(1).mean(), {"calibration": batches})
    result = compressed_by(chosen, model, linear, view)
    measured = linear.evaluate(result.model).loss - linear.evaluate(model).loss
    assert len(result.plan) > 1
    assert result.predicted_change == pytest.approx(measured, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("chosen", [Truncation(ratio=0.4), Lossless(gamma=None), Compact(gamma=None)], ids=str)
def test_a_quadratic_loss_misses_exactly_its_second_order(chosen: Algorithm, view: Any) -> None:
    model, batches = doubles()
    quadratic = Objective(lambda out, targets: 0.5 * (out - targets).square().sum(1).mean(), {"calibration": batches})
    result = compressed_by(chosen, model, quadratic, view)
    measured = quadratic.evaluate(result.model).loss - quadratic.evaluate(model).loss
    x = torch.cat([inputs for inputs, _ in batches])
    with torch.no_grad():
        second_order = 0.5 * (result.model(x) - model(x)).square().sum(1).mean().item()
    assert result.plan and second_order > 0
    assert measured - result.predicted_change == pytest.approx(second_order, rel=1e-9)


def test_batchnorm_keeps_its_statistics(algorithm: Algorithm, net: nn.Sequential, objective: Objective) -> None:
    if getattr(algorithm, "batch_norm", False):  # its setting says that they follow the compression
        algorithm = dataclasses.replace(algorithm, batch_norm=False)  # type: ignore[type-var]
    if trains(algorithm):
        return
    result = compressed_by(algorithm, net, objective)
    for part in ("running_var", "num_batches_tracked") if refits(algorithm) else STATISTICS:
        assert torch.equal(getattr(result.model[1], part), getattr(net[1], part))
    with evaluating(result.model), torch.no_grad():  # one sample at a time or all at once: the same logits
        x = objective.splits["calibration"][0][0]
        torch.testing.assert_close(result.model(x), torch.cat([result.model(one[None]) for one in x]))


def test_batchnorm_follows_any_algorithm(algorithm: Algorithm, net: nn.Sequential, objective: Objective) -> None:
    """The statistics become those of a re-estimation, twice as good as once; nothing else changes.

    Those of an algorithm that trains are its own: there it is refused.
    """
    result = compressed_by(algorithm, net, objective)
    assert result.trained == trains(algorithm)
    if result.trained:
        with pytest.raises(UserError, match="which a training leaves"):
            result.settle("follow", objective)
        return
    expected = copy.deepcopy(result.model)
    if result.plan:
        reestimate(expected, net, objective, samples=SAMPLES)
    dense = copy.deepcopy(net.state_dict())
    for _ in range(2):
        followed = result.settle("follow", objective)
        for name, value in followed.model.state_dict().items():
            assert torch.equal(value, expected.state_dict()[name])
    assert all(torch.equal(value, dense[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_refused_with_its_layer(
    algorithm: Algorithm, net: nn.Sequential, objective: Objective, value: float
) -> None:
    with torch.no_grad():
        net[6].weight[0, 0] = value
    with pytest.raises(UserError, match="^layer 6: a weight holds NaN or infinity"):
        compressed_by(algorithm, net, objective)


def test_a_model_with_nothing_to_factor_is_refused(algorithm: Algorithm, batches: Any, objective: Objective) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.Flatten(), nn.LazyLinear(1))
    model(batches[0][0])
    with pytest.raises(UserError, match="nothing to factor"):
        compressed_by(algorithm, model, objective)


@pytest.mark.parametrize("first", [SVD(), SVD("spatial"), SubspaceSVD(2), Tucker2()], ids=str)
def test_a_compressed_model_is_compressed_again(
    algorithm: Algorithm, net: nn.Sequential, objective: Objective, tmp_path: Path, first: Decomposer
) -> None:
    """What another round does not make smaller stays as it is; the plan and the file hold both rounds."""
    dense = copy.deepcopy(net)
    once = Truncation(ratio=0.8).compress(net, first, objective)
    before = copy.deepcopy(once.model.state_dict())
    twice = compressed_by(algorithm, once.model, objective)
    assert all(torch.equal(value, before[name]) for name, value in once.model.state_dict().items())
    assert twice.dense is once.model and twice.params_kept <= 1
    factored = {name for name, module in twice.model.named_modules() if isinstance(module, FactoredLayer)}
    assert factored == set(twice.plan) and not any(name.count(".") for name in twice.plan)
    if not trains(algorithm):
        report = twice.report
        saved = (report["params_before"] - report["params_after"]).sum()
        assert parameters(once.model) - parameters(twice.model) == saved
    twice.save(tmp_path / "twice.safetensors")
    loaded = single_file.load(tmp_path / "twice.safetensors", dense)
    x = objective.splits["calibration"][0][0]
    with evaluating(loaded), evaluating(twice.model), torch.no_grad():
        torch.testing.assert_close(loaded(x), twice.model(x), rtol=0 if not trains(algorithm) else 1e-5, atol=0)
