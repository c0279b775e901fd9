"""What a dry run says beforehand, against what the selection then takes and gives."""

import copy
import time
from typing import Any

import pytest
import torch
from torch import nn

import spectrim
from spectrim.algorithms.forecast import Forecast
from spectrim.algorithms.shared import rehearsal
from spectrim.api import NO_SIZE
from spectrim.errors import UserError
from spectrim.tools.profiling import Timed


def convolutions() -> tuple[nn.Module, Any]:
    layers = [nn.Conv2d(8, 64, 3, padding=1), *(nn.Conv2d(64, 64, 3, padding=1) for _ in range(3))]
    body = [part for layer in layers for part in (layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU())]
    net = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()
    return net, [(torch.randn(16, 8, 16, 16), torch.randint(10, (16,))) for _ in range(4)]


def linears() -> tuple[nn.Module, Any]:
    net = nn.Sequential(nn.Linear(128, 384), nn.ReLU(), nn.Linear(384, 384), nn.ReLU(), nn.Linear(384, 10)).eval()
    return net, [(torch.randn(64, 128), torch.randint(10, (64,))) for _ in range(4)]


CHOICES = [
    spectrim.Joint(params_kept=0.5, samples=64, refit=64),
    spectrim.Lossless(gamma=None, verified=True, verify_on="calibration"),
]


@pytest.mark.parametrize("given", [convolutions, linears])
@pytest.mark.parametrize("algorithm", CHOICES, ids=["joint", "verified"])
def test_the_time_is_told_within_a_factor(given: Any, algorithm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "clock", time.process_time)  # of this process alone, whatever else the machine does
    net, batches = given()
    decomposer = spectrim.WhitenedSVD(view="channel", samples=64)
    choice: Any = {"calibration": batches, "algorithm": algorithm, "decomposer": decomposer}
    told = sum(spectrim.compress(copy.deepcopy(net), **choice, dry_run=True).seconds.values())
    with Timed() as spent:
        spectrim.compress(net, **choice)
    assert 0.25 < told / spent.cpu_seconds < 4 or (algorithm is CHOICES[1] and told > spent.cpu_seconds / 4)


def test_a_refinement_is_told_and_takes_longer_with_more_samples() -> None:
    net, batches = linears()
    told = []
    for samples in (1000, 4000):
        refine = spectrim.Refinement(samples=samples)
        algorithm = spectrim.Joint(params_kept=0.5, samples=64, refit=64, refine=refine)
        told.append(spectrim.compress(net, calibration=batches, algorithm=algorithm, dry_run=True))
    first, second = (own.seconds["refine"] for own in told)
    assert 0 < first < second
    assert told[0].memory_mib["refine"] > 0


@pytest.mark.parametrize("given", [convolutions, linears])
def test_the_size_is_that_of_the_budget(given: Any) -> None:
    net, batches = given()
    told = spectrim.compress(net, calibration=batches, algorithm=CHOICES[0], dry_run=True)
    result = spectrim.compress(net, calibration=batches, algorithm=CHOICES[0])
    assert told.dense == result.dense_cost
    assert told.compressed.params / result.cost.params == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize(
    "choice",
    [
        {"algorithm": spectrim.Truncation(rank=3)},
        {"algorithm": spectrim.Truncation(ratio=0.5)},
        {"algorithm": spectrim.Truncation(ratio=0.5), "overrides": {"6": 2}, "exclude": ["8"]},
        {"plan": {"0": 2, "6": 4}},
    ],
)
def test_a_rule_that_sets_all_ranks_is_told_exactly(net: nn.Module, batches: Any, choice: Any) -> None:
    told = spectrim.compress(net, calibration=batches, dry_run=True, **choice)
    result = spectrim.compress(net, calibration=batches, **choice)
    assert told.compressed == result.cost and told.dense == result.dense_cost
    columns = ["layer", "shape", "full_rank", "break_even", "rank", "params_before", "params_after"]
    ours = told.layers[columns].set_index("layer")
    theirs = result.report[columns].set_index("layer")
    assert ours.loc[theirs.index].equals(theirs)


def test_the_memory_holds_what_the_selection_holds() -> None:
    net, batches = linears()
    told = spectrim.compress(net, calibration=batches, algorithm=CHOICES[0], dry_run=True)
    assert set(told.memory_mib) == {"decompose", "build", "gates", "refit"}
    spectra = 8 * sum(
        full * (rows + columns) for full, rows, columns in ((128, 384, 128), (384, 384, 384), (10, 10, 384))
    )
    assert all(spectra / 2**20 < own < 20 * spectra / 2**20 for own in told.memory_mib.values())


class Heads(nn.Module):
    """Two layers that read one tensor, or two tensors of equal values."""

    def __init__(self, together: bool) -> None:
        super().__init__()
        self.q, self.k, self.together = nn.Linear(32, 16), nn.Linear(32, 16), together

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x) + self.k(x if self.together else x * 1)


def test_a_moment_that_layers_hold_together_counts_once() -> None:
    batches, whitened = [(torch.randn(4, 32), torch.randint(16, (4,)))], spectrim.WhitenedSVD("channel", samples=4)
    together, apart = (
        spectrim.compress(Heads(own), calibration=batches, params_kept=0.5, decomposer=whitened, dry_run=True)
        for own in (True, False)
    )
    assert apart.memory_mib["decompose"] - together.memory_mib["decompose"] == 8 * 32**2 / 2**20


def test_smaller_batches_are_advised_where_they_help() -> None:
    net, batches = convolutions()
    for size, advised in ((16, True), (1, False)):
        inputs, targets = batches[0]
        given = list(zip(inputs.split(size), targets.split(size), strict=True))
        told = spectrim.compress(net, calibration=given, params_kept=0.5, dry_run=True)
        assert any(note.startswith("with batches of one sample") for note in told.notes) == advised


def test_it_reads_as_a_report(net: nn.Module, batches: Any) -> None:
    told = spectrim.compress(net, calibration=batches, algorithm="joint", exclude=["8"], dry_run=True)
    assert isinstance(told, Forecast)
    text = str(told)
    assert text.startswith("Joint: nothing is compressed yet\nparameters  ")
    assert "8: left dense: " in text and "MiB above the present" in text and "time        about " in text


def test_nothing_is_changed_and_nothing_is_kept(net: nn.Module, batches: Any, tmp_path: Any) -> None:
    net.train()
    before = copy.deepcopy(net.state_dict())
    spectrim.compress(net, calibration=batches, algorithm="joint", dry_run=True, resume=tmp_path)
    assert net.training and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("decomposer", [spectrim.SVD(), spectrim.WhitenedSVD(samples=16)])
def test_the_random_numbers_of_the_caller_are_left_alone(net: nn.Module, batches: Any, decomposer: Any) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    for algorithm in CHOICES:
        spectrim.compress(net, calibration=batches, algorithm=algorithm, decomposer=decomposer, dry_run=True)
    assert torch.equal(torch.rand(2), expected)


def test_without_batches_what_needs_none_is_told(net: nn.Module) -> None:
    told = spectrim.compress(net, algorithm=spectrim.Truncation(ratio=0.5), dry_run=True)
    assert told.compressed.params < told.dense.params and set(told.seconds) == {"decompose"}
    assert "nan" not in str(told)
    for needs in ({"algorithm": "joint"}, {}, {"decomposer": spectrim.WhitenedSVD(), "plan": {"0": 2}}):
        with pytest.raises(UserError, match="^calibration batches are missing; pass calibration="):
            spectrim.compress(net, **needs, dry_run=True)  # type: ignore[arg-type]


def test_without_a_budget_the_size_is_not_known(net: nn.Module, batches: Any) -> None:
    told = spectrim.compress(net, calibration=batches, dry_run=True)
    assert told.compressed is None and told.layers["rank"].isna().all() and NO_SIZE in told.notes
    assert "parameters  " in str(told) and "-> not known before the selection" in str(told)


def test_an_algorithm_that_says_nothing_of_its_work_is_noted(net: nn.Module, batches: Any) -> None:
    told = spectrim.compress(net, calibration=batches, algorithm="evbmf", dry_run=True)
    assert told.notes[-1].startswith("the time is that of the decompositions: this algorithm does not say")


def test_what_one_batch_shows_is_refused(net: nn.Module, batches: Any) -> None:
    x = batches[0][0]
    verified = spectrim.Compact(verified=True)
    with pytest.raises(UserError, match="^verification batches are missing"):
        spectrim.compress(net, calibration=batches, algorithm=verified, dry_run=True)
    with pytest.raises(UserError, match="target 5 does not fit a model with 5 classes"):
        spectrim.compress(net, calibration=[(x, torch.full((16,), 5))], algorithm="joint", dry_run=True)


def test_a_two_sided_decomposition_is_rehearsed_with_its_gradients(net: nn.Sequential, batches: Any) -> None:
    one, both = (
        spectrim.compress(net, calibration=batches, params_kept=0.5, decomposer=decomposer, dry_run=True)
        for decomposer in (spectrim.WhitenedSVD("channel"), spectrim.TwoSidedSVD("channel"))
    )
    assert both.memory_mib["decompose"] > one.memory_mib["decompose"]  # moments of outputs too


@pytest.mark.parametrize("budget", [{"params_kept": 0.02}, {"macs_kept": 0.02}])
@pytest.mark.parametrize("factors", ["plain", "pivoted"])
def test_a_budget_out_of_reach_is_refused_as_by_the_selection(
    net: nn.Sequential, batches: Any, budget: Any, factors: Any
) -> None:
    given: Any = {"calibration": batches, "algorithm": spectrim.Joint(**budget), "exclude": ["8"]}
    given["decomposer"] = spectrim.WhitenedSVD("channel", factors=factors)
    said = []
    for dry in (True, False):
        with pytest.raises(
            spectrim.UserError, match=r"_kept=0.02 is out of reach: at rank 1 0\.\d+ of them remain"
        ) as refusal:
            spectrim.compress(net, **given, dry_run=dry)
        said.append(str(refusal.value))
    assert said[0] == said[1]


@pytest.mark.parametrize("kept", [0.2, 0.35, 0.5, 0.8, 0.97])
@pytest.mark.parametrize("measure", ["params", "macs"])
@pytest.mark.parametrize("factors", ["plain", "pivoted"])
def test_it_is_within_the_budget_that_it_foresees(
    net: nn.Sequential, batches: Any, kept: float, measure: str, factors: Any
) -> None:
    """Also where a share of a small layer would be less than one component."""
    told = spectrim.compress(
        net,
        calibration=batches,
        algorithm=spectrim.Joint(**{f"{measure}_kept": kept}),
        decomposer=spectrim.WhitenedSVD("channel", factors=factors),
        overrides={"3": 2},
        dry_run=True,
    )
    assert getattr(told.compressed, measure) <= kept * getattr(told.dense, measure)
    assert told.layers.set_index("layer")["rank"]["3"] == 2
