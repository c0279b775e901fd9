"""A model may hold a layer in a list, a bound method or a hook, too: all of them see the factored layer."""

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module, invalidate_caches
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spectrim
from spectrim.algorithms.probe import Probe
from spectrim.statistics.objective import Objective
from spectrim.surgery import replacing

FEATURES, CLASSES = 12, 5


def of_list(layer: nn.Module) -> Any:
    return [layer]


def of_bound_method(layer: nn.Module) -> Any:
    return [layer.forward]


def of_partial(layer: nn.Module) -> Any:
    return (partial(layer.__call__),)


class Held(nn.Module):
    """Calls its second layer by what ``hold`` makes of it."""

    def __init__(self, hold: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(FEATURES, 24), nn.Linear(24, 24), nn.Linear(24, CLASSES)
        self.held = hold(self.inner)
        self.inner.register_forward_hook(lambda _, __, output: 2 * output)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.held[0](self.first(x).relu())
        return self.last(y.relu())


def seeded(hold: Callable[[nn.Module], Any], seed: int) -> Held:
    torch.manual_seed(seed)
    return Held(hold).eval()


@pytest.fixture
def data() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(16, FEATURES), torch.randint(CLASSES, (16,))) for _ in range(3)]


@pytest.mark.parametrize("hold", [of_list, of_bound_method, of_partial])
@pytest.mark.parametrize("calibrated", [True, False])
def test_a_loaded_model_computes_what_was_saved(hold: Any, calibrated: bool, data: Any, tmp_path: Path) -> None:
    given = {"calibration": data} if calibrated else {}
    result = spectrim.compress(seeded(hold, 0), algorithm=spectrim.Truncation(ratio=0.5), **given)
    # A run shows that a bound ``forward`` is another way to read the weight.
    assert ("inner" in result.plan) != (calibrated and hold is of_bound_method)
    result.save(tmp_path / "small.safetensors")
    loaded, x = spectrim.load(tmp_path / "small.safetensors", into=seeded(hold, 1)), data[0][0]
    assert torch.equal(loaded(x), result.model(x))


def test_plain_layers_are_put_in_every_place_and_keep_their_hooks(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = spectrim.compress(seeded(of_list, 0), calibration=data, algorithm=spectrim.Truncation(ratio=0.5))
    result.export("plain", tmp_path / "held_plain")
    monkeypatch.syspath_prepend(tmp_path)
    invalidate_caches()
    try:
        loaded = import_module("held_plain").load(seeded(of_list, 1))
    finally:
        sys.modules.pop("held_plain", None)
    torch.testing.assert_close(loaded(data[0][0]), result.model(data[0][0]))


def test_each_part_of_a_plain_model_keeps_its_own_precision(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mixed(Held):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.double()).float()

    def built(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(FEATURES, 24), nn.ReLU(), Mixed(of_list).double())
        model[2].first = nn.Linear(24, 24).double()
        return model.eval()

    result = spectrim.compress(built(0), calibration=data, algorithm=spectrim.Truncation(ratio=0.5))
    assert {"0", "2.inner"} <= set(result.plan)
    result.export("plain", tmp_path / "mixed_plain")
    monkeypatch.syspath_prepend(tmp_path)
    invalidate_caches()
    try:
        loaded = import_module("mixed_plain").load(built(1))
    finally:
        sys.modules.pop("mixed_plain", None)
    assert [p.dtype for p in loaded.parameters()] == [torch.float32] * 3 + [torch.float64] * 9
    torch.testing.assert_close(loaded(data[0][0]), result.model(data[0][0]))


def test_an_algorithm_that_measures_each_cut_measures_it_there(data: Any) -> None:
    """Every rank changes the loss: none is measured on the dense layer."""
    model = seeded(of_list, 0)
    readings = Probe(ratios=(0.25, 0.5)).measure(
        model, spectrim.SVD(), Objective(F.cross_entropy, {"calibration": data})
    )
    rows = [row for row in readings.rows if row["layer"] == "inner"]
    assert len(rows) == 2 and all(row["measured"] != 0 for row in rows)


def test_a_second_compression_reaches_it_too(data: Any) -> None:
    """The inner layer stays as the first compression left it."""
    once = spectrim.compress(seeded(of_list, 0), algorithm=spectrim.Truncation(rank=2), include=["inner"])
    twice = spectrim.compress(once.model, algorithm=spectrim.Truncation(rank=2), include=["first"])
    assert set(twice.plan) == {"first", "inner"}
    assert twice.model.held[0] is twice.model.inner and twice.model.inner.rank == 2


@pytest.mark.parametrize("kind", [nn.Linear, nn.Embedding, nn.Conv2d])
def test_a_layer_stays_the_same_object_and_an_undoing_restores_it(kind: Any) -> None:
    sizes = {nn.Linear: (8, 8), nn.Embedding: (9, 8), nn.Conv2d: (8, 8, 3)}[kind]
    model: Any = nn.Sequential(kind(*sizes))
    layer, before = model[0], dict(vars(model[0]))
    undo = replacing.replace(model, "0", spectrim.SVD(embeddings=True).spectrum(layer).factor(2))
    assert model[0] is layer and layer.rank == 2 and not isinstance(layer, kind)
    undo()
    assert model[0] is layer and type(layer) is kind and vars(layer) == before
