"""A selection for which memory is short says so before it decomposes anything, and goes on."""

import time
from typing import Any

import pytest
import torch
from torch import nn

import spectrim
from spectrim.algorithms.shared import outline
from spectrim.algorithms.shared.outline import Outline, decomposing_bytes
from spectrim.cli import run
from spectrim.decomposers.spectrum import outputs_of
from spectrim.decomposers.svd import SVD
from spectrim.decomposers.two_sided import TwoSidedSVD
from spectrim.decomposers.whitened import WhitenedSVD
from spectrim.factored.dense import DenseLayer


def linears(width: int = 16) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, width))


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is logged on a machine of few bytes."""
    monkeypatch.setattr(outline, "free_memory", lambda: 40_000)
    return lambda: [record.getMessage() for record in caplog.records if record.name == outline.__name__]


def test_the_bytes_are_those_of_a_hand_count() -> None:
    net = linears()
    layers = [Outline.of(name, net[int(name)], WhitenedSVD(view="channel")) for name in ("0", "2")]
    spectra, model = 2 * 8 * 16 * (32 + 16), 4 * (2 * 16 * 32 + 16 + 32)
    moments, largest = 8 * (16**2 + 32**2), 8 * (4 * 16 * 32 + 6 * 32**2)
    told = decomposing_bytes(net, layers, None)
    assert told == {"held": spectra, "decompose": spectra + moments + largest, "build": spectra + 2 * model}
    for at_once, part in ((1, 0.5), (1000, 1)):  # they are spilled one by one, and moments gathered in blocks
        told = decomposing_bytes(net, layers, at_once)
        assert told["held"] == spectra / 2 and told["decompose"] == spectra / 2 + part * moments + largest
    assert decomposing_bytes(net, layers, 1, moments=100)["decompose"] == spectra / 2 + 50 + largest


def test_a_large_moment_takes_its_triangle() -> None:
    layer = Outline.of("0", nn.Linear(300, 300), WhitenedSVD(view="channel"))
    assert layer.moment_bytes == 8 * 300 * 301 // 2


def test_the_moments_of_an_embedding_are_a_diagonal() -> None:
    layer = Outline.of("0", nn.Embedding(1000, 8), WhitenedSVD(view="channel", embeddings=True))
    assert layer.moment_entries == 1000
    both = Outline.of("0", nn.Embedding(1000, 8), TwoSidedSVD(embeddings=True))
    assert both.moment_entries == 1000 + 8**2  # that of the gradients is none


@pytest.mark.parametrize("factors", ["plain", "pivoted"])
@pytest.mark.parametrize(
    "layer", [nn.Linear(9, 6), nn.Linear(6, 6), nn.Linear(5, 8), nn.Embedding(9, 4), nn.Conv2d(4, 6, 3, groups=2)]
)
def test_its_costs_are_those_of_the_spectrum(layer: nn.Module, factors: Any) -> None:
    decomposer = SVD("channel", embeddings=True, factors=factors)
    found, spectrum = Outline.of("0", layer, decomposer), decomposer.spectrum(layer)
    assert found.break_even == spectrum.break_even and found.full_rank == spectrum.max_rank
    for rank in range(1, spectrum.max_rank + 1):
        assert found.cost(rank) == spectrum.cost(rank) and found.form_at(rank) == spectrum.kept(rank).form
        assert found.rank_within(spectrum.cost(rank)) == spectrum.rank_within(spectrum.cost(rank))
        assert sum(one.weight.numel() for one in found.factor(rank).factors) == spectrum.cost(rank)


def test_compress_says_it_and_goes_on(said: Any) -> None:
    net, batches = linears(64), [(torch.randn(8, 64), None)]
    rule = spectrim.Truncation(ratio=0.5)
    result = spectrim.compress(net, calibration=batches, algorithm=rule, decomposer=SVD())
    assert result.plan and said() == ["needs about 0.000115 GB of memory, and 4e-05 GB are free; give layers_at_once=8"]
    spectrim.compress(net, calibration=batches, algorithm=rule, decomposer=SVD(), layers_at_once=1)
    assert said()[1].endswith("give less than layers_at_once=1")


def test_it_is_what_a_dry_run_tells(said: Any) -> None:
    net, rule = linears(64), spectrim.Truncation(ratio=0.5)
    told = spectrim.compress(net, algorithm=rule, decomposer=SVD(), dry_run=True)
    assert not said()  # a dry run decomposes single layers
    spectrim.compress(net, algorithm=rule, decomposer=SVD())
    assert f"needs about {max(told.memory_mib.values()) * 2**20 / 1e9:.3g} GB" in said()[0]


def test_where_there_is_enough_nothing_is_said(said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outline, "free_memory", lambda: 10**9)
    spectrim.compress(linears(64), algorithm=spectrim.Truncation(ratio=0.5))
    assert not said()


def test_a_cell_of_a_grid_says_it(said: Any, compose: Any, digits: list[str]) -> None:
    run.run(compose(*digits, "algorithm=truncation"))
    assert len(said()) == 1 and "are free; give layers_at_once=8" in said()[0]


@pytest.mark.parametrize("decomposer", [WhitenedSVD("channel"), TwoSidedSVD("channel")], ids=repr)
def test_operations_of_small_and_large_layers_take_like_times(decomposer: Any) -> None:
    rates = []
    for rows, columns in ((192, 576), (576, 1536), (1152, 576)):  # an SVD; the Gram matrix; that of a tall matrix
        layer = nn.Linear(columns, rows)
        view = DenseLayer.of(layer).view("channel")
        x, g = torch.randn(2000, columns), torch.randn(2000, rows)
        moments = {view: (x.T @ x).double()[None] / 2000, outputs_of(view): (g.T @ g).double()[None] / 2000}
        times = []
        for _ in range(2):
            start = time.process_time()
            decomposer.spectrum(layer, moments)
            times.append(time.process_time() - start)
        rates.append(min(times) / Outline.of("", layer, decomposer).decomposition)
    assert max(rates) < 4 * min(rates)
