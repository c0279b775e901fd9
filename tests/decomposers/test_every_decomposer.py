"""What holds for every decomposer of ``conf/decomposer``, found by listing that folder: a new one is tested unasked."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spectrim
from spectrim.algorithms.shared.budget import costs_of
from spectrim.algorithms.shared.measurement import Measurement
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.batches import evaluating
from spectrim.cli import run
from spectrim.decomposers.spectrum import Decomposer
from spectrim.factored.plan import RankPlan
from spectrim.records import records
from spectrim.runs import configuration, targets
from spectrim.statistics.objective import Objective
from spectrim.surgery import replacing
from spectrim.surgery.cost import layer_macs, parameters

NAMES, ALGORITHMS = (
    sorted(path.stem for path in (Path(configuration.CONF) / group).glob("*.yaml"))
    for group in ("decomposer", "algorithm")
)


@pytest.fixture(params=NAMES)
def decomposer(request: pytest.FixtureRequest, compose: Any) -> Decomposer:
    return targets.build(configuration.plain(compose(f"decomposer={request.param}").decomposer))


@pytest.mark.parametrize("name", NAMES)
def test_a_run_yields_a_record(compose: Any, digits: list[str], tmp_path: Path, name: str) -> None:
    cfg = compose(*digits, f"decomposer={name}", "algorithm=truncation", "data.calibration_size=50")
    record = run.run(cfg)
    assert record["names"]["decomposer"] == name and record["plan"]
    assert records.read_all(tmp_path, "runs") == [json.loads(json.dumps(record))]


def test_full_rank_reproduces_the_model(decomposer: Decomposer, net: nn.Sequential, objective: Objective) -> None:
    bench = Workbench.of(net, decomposer, objective)
    plan = RankPlan.of({name: spectrum.kept(spectrum.max_rank) for name, spectrum in bench.spectra.items()})
    factored = replacing.apply(net, plan, bench.spectra)
    with evaluating(net), evaluating(factored), torch.no_grad():
        expected, got = net(bench.example), factored(bench.example)
    assert plan.keys() == {"0", "3", "6", "8"} and (got - expected).norm() <= 1e-5 * expected.norm()


def test_curves_agree_with_the_factored_weight(
    decomposer: Decomposer, net: nn.Sequential, objective: Objective, weight_of: Any
) -> None:
    bench = Workbench.of(net, decomposer, objective)
    predicted, gradients = bench.first_order(), objective.gradients(net, list(bench.spectra))
    for name, spectrum in bench.spectra.items():
        layer = net.get_submodule(name)
        for rank in sorted({1, spectrum.break_even, spectrum.max_rank}):
            change = (weight_of(spectrum.factor(rank), getattr(layer, "groups", 1)) - layer.weight).detach().double()
            assert float(spectrum.error()[rank]) == pytest.approx(float(change.norm()), rel=1e-4, abs=1e-5)
            assert float(spectrum.largest_entry()[rank]) == pytest.approx(float(change.abs().max()), rel=1e-4, abs=1e-5)
            inner = float((gradients[name] * change).sum())
            assert float(predicted[name][rank]) == pytest.approx(inner, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_parameters_and_macs_are_those_of_the_factored_model(
    decomposer: Decomposer, net: nn.Sequential, objective: Objective, rank: int
) -> None:
    bench = Workbench.of(net, decomposer, objective)
    names = [name for name, spectrum in bench.spectra.items() if rank <= spectrum.break_even]
    factored = replacing.apply(net, RankPlan.of({n: bench.spectra[n].kept(rank) for n in names}), bench.spectra)
    macs, _ = layer_macs(factored, names, bench.example)
    expected = costs_of(bench, "macs")
    assert names and {name: float(expected.curves[name][rank]) for name in names} == macs
    share = costs_of(bench, "params").achieved(dict.fromkeys(names, rank))
    assert share == pytest.approx(parameters(factored) / parameters(net))


# They choose among singular components, of which a Tucker decomposition has none.
REFUSED = {("tucker2", algorithm) for algorithm in ("evbmf", "global_threshold", "rank_selection")}
REFUSED |= {("tucker2", algorithm) for algorithm in ("joint", "joint_cut", "joint_refined")}
# It splits the plain SVD.
REFUSED |= {(name, "alds") for name in ("tucker2", "whitened_best_view")}
# What is trained as U, S and V starts from a plain SVD.
TRAINED = (
    "svd_training",
    "svd_training_nuclear",
    "svd_training_plain",
    "svd_training_priced",
    "cuttlefish",
    "haloc",
    "l0_gates",
)
REFUSED |= {(name, algorithm) for name in ("tucker2", "whitened_best_view") for algorithm in TRAINED}
# It brings a decomposition of its own.
REFUSED |= {(name, "aimet") for name in ("tucker2", "whitened_best_view")}
REFUSALS = "^layer 0: | needs the plain SVD .decomposer=svd_channel or svd_spatial., not "


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", ["tucker2", "whitened_best_view"])
def test_any_algorithm_takes_it_or_says_why_not(
    name: str, algorithm: str, compose: Any, brief: Any, net: nn.Sequential, objective: Objective
) -> None:
    cfg = compose(f"decomposer={name}", f"algorithm={algorithm}")
    selector, decomposer = (targets.build(configuration.plain(cfg[group])) for group in ("algorithm", "decomposer"))
    selector = brief(selector)
    if isinstance(selector, Measurement):
        assert selector.measure(net, decomposer, objective).rows
        return
    if (name, algorithm) in REFUSED:
        with pytest.raises(spectrim.UserError, match=REFUSALS) as refusal:
            selector.compress(net, decomposer, objective)
        assert "\n" not in str(refusal.value)
        return
    result = selector.compress(net, decomposer, objective)
    report = result.report.set_index("layer")
    assert parameters(net) - parameters(result.model) == (report["params_before"] - report["params_after"]).sum()
    factored = report.dropna(subset="rank")
    assert (factored["rank"] <= factored["break_even"]).all() and result.params_kept <= 1


def test_compressed_saved_and_loaded_gives_the_same_logits(
    decomposer: Decomposer, net: nn.Sequential, batches: Any, tmp_path: Path
) -> None:
    dense = copy.deepcopy(net)
    truncation = spectrim.Truncation(params_kept=0.6)
    result = spectrim.compress(net, calibration=batches, algorithm=truncation, decomposer=decomposer)
    assert 0.4 < result.params_kept <= 0.6 and RankPlan.from_json(result.plan.to_json()) == result.plan
    result.save(tmp_path / "small.safetensors")
    loaded = spectrim.load(tmp_path / "small.safetensors", into=dense)
    with evaluating(loaded), evaluating(result.model), torch.no_grad():
        assert torch.equal(loaded(batches[0][0]), result.model(batches[0][0]))
