"""What is summed of a model in 16 bits, or under autocast, is what its layers saw, summed in float64 by hand."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.algorithms.truncation import Truncation
from spectrim.decomposers.spectrum import Directions
from spectrim.decomposers.svd import SVD
from spectrim.refit import factors
from spectrim.refit.distance import relative_error
from spectrim.refit.factors import refit
from spectrim.statistics import shifted_moments
from spectrim.statistics.batchnorm import reestimate
from spectrim.statistics.gradients import mean_gradients
from spectrim.statistics.input_moments import input_moments
from spectrim.statistics.objective import Objective
from spectrim.statistics.output_moments import output_moments
from spectrim.tools.precision import exact

HALVES = torch.bfloat16, torch.float16
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 8), (5, 12)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 6, 5)),
    "strided and grouped": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, groups=2), (4, 7, 8)),
    "wide": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 6, 5)),
}


class Around(nn.Module):
    """A layer in a model that may enter autocast itself."""

    def __init__(self, layer: nn.Module, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.layer, self.autocast, self.norm = layer, autocast, nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", self.autocast) if self.autocast else nullcontext():
            return torch.tanh(self.layer(x)).flatten(1)[:, :6].float()


def model_in(layer: nn.Module, precision: str, dtype: torch.dtype) -> tuple[Around, torch.dtype]:
    """Return a model, and the precision of its inputs."""
    if precision == "weights":
        return Around(layer, None).to(dtype).eval(), dtype
    return Around(layer, dtype if precision == "autocast of the model" else None).eval(), torch.float32


PRECISIONS = pytest.mark.parametrize("precision", ["weights", "autocast of the model", "autocast of the caller"])
KINDS = pytest.mark.parametrize("kind", LAYERS)


@pytest.fixture(params=HALVES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@contextmanager
def called(precision: str, dtype: torch.dtype) -> Iterator[None]:
    """Call as ``compress`` does, from inside of autocast or not."""
    with torch.autocast("cpu", dtype, enabled=precision == "autocast of the caller"), exact():
        yield


@contextmanager
def watched(layer: nn.Module) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield the inputs and the outputs of all calls of ``layer``."""
    inputs, outputs = list[Tensor](), list[Tensor]()

    def note(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        inputs.append(args[0])
        outputs.append(output)
        if output.requires_grad:
            output.retain_grad()

    handle = layer.register_forward_hook(note)
    try:
        yield inputs, outputs
    finally:
        handle.remove()


def by_hand(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the rows of inputs in float64, (g, rows, I)."""
    x = x.detach().double()
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(1, -1, x.shape[-1])
    patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return patches.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def rows_of(layer: nn.Module, y: Tensor) -> Tensor:
    """Return the rows of outputs in float64, (g, rows, O)."""
    y = y.detach().double()
    if not isinstance(layer, nn.Conv2d):
        return y.reshape(1, -1, y.shape[-1])
    return y.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 4, 2).flatten(1, 3)


def second(one: Tensor, other: Tensor) -> Tensor:
    return one.mT @ other / one.shape[1]


def same(found: Tensor, expected: Tensor) -> None:
    assert found.isfinite().all()
    assert (found.double() - expected).norm() <= 1e-5 * expected.norm()


@pytest.fixture
def given(kind: str, precision: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> tuple[Around, Objective]:
    """A model with a layer of the kind, and two batches of numbers around 300, whose squares overflow float16."""
    if kind == "wide":
        monkeypatch.setattr(shifted_moments, "LARGE", 1)
    make, shape = LAYERS[kind]
    model, of_inputs = model_in(make(), precision, dtype)
    with torch.no_grad():
        model.layer.weight.div_(300)
    batches = [((300 + 30 * torch.randn(n, *shape)).to(of_inputs), torch.randint(6, (n,))) for n in (8, 5)]
    return model, Objective(F.cross_entropy, {"calibration": batches, "train": batches})


@PRECISIONS
@KINDS
def test_moments_of_inputs(given: tuple[Around, Objective], kind: str, precision: str, dtype: torch.dtype) -> None:
    model, objective = given
    view = "linear" if kind == "linear" else "channel"
    with watched(model.layer) as (inputs, _), called(precision, dtype):
        found = input_moments(model, {"layer": [view]}, objective, 13)["layer"][view]
    rows = torch.cat([by_hand(model.layer, x) for x in inputs], 1)
    same(found, second(rows, rows))


@PRECISIONS
@KINDS
def test_moments_of_gradients(given: tuple[Around, Objective], kind: str, precision: str, dtype: torch.dtype) -> None:
    model, objective = given
    view = "linear" if kind == "linear" else "channel"
    with watched(model.layer) as (_, outputs), called(precision, dtype):
        directions = Directions(labels=True)
        found = output_moments(model, {"layer": [view]}, objective, 13, directions)["layer"][view]
    rows = torch.cat([rows_of(model.layer, y.grad) for y in outputs], 1)  # type: ignore[arg-type]
    same(found, rows.mT @ rows / 13)


@PRECISIONS
@KINDS
def test_moments_of_a_refit(
    given: tuple[Around, Objective], kind: str, precision: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, objective = given
    seen: list[Any] = []
    whole = factors.moments_of
    monkeypatch.setattr(factors, "moments_of", lambda *args: seen.append((*args, whole(*args))) or seen[-1][-1])
    compressed = Truncation(ratio=0.6).compress(model, SVD(), objective).model
    with called(precision, dtype):
        assert refit(compressed, model, objective, 13) == []
    [(layer, flows, _, found)] = seen
    x = torch.cat([by_hand(layer, own) for own in flows.x], 1)
    y = torch.cat([rows_of(layer, own) for own in flows.y], 1)
    for one, other in zip(found.means, (second(x, x), second(y, x), x.mean(1), y.mean(1)), strict=True):
        same(one, other)
    assert compressed.layer.first.weight.dtype == model.layer.weight.dtype


@pytest.mark.parametrize("batches", [1, 600])
def test_a_gradient_is_the_mean_over_all_batches(dtype: torch.dtype, batches: int) -> None:
    """A sum in 16 bits stops to grow once a batch is less than its last digit."""
    layer = nn.Linear(6, 3).to(dtype)
    x, y = torch.rand(4, 6).to(dtype), torch.randn(4, 3).to(dtype)
    given = [(x, y)] * batches
    found = mean_gradients(layer, {"": layer.weight}, lambda out, y: (out * y).float().mean(), given, "calibration")[""]
    once = torch.autograd.grad((layer(x) * y).float().mean(), layer.weight)[0]
    same(found, once.double())


def test_statistics_of_batch_norm_do_not_overflow() -> None:
    norm = nn.BatchNorm1d(4).half()
    dense = nn.Sequential(nn.Linear(4, 4).half(), norm).eval()
    with torch.no_grad():
        dense[0].weight.copy_(torch.eye(4))
    compressed = nn.Sequential(nn.Linear(4, 4).half(), nn.BatchNorm1d(4).half()).eval()
    compressed.load_state_dict(dense.state_dict())
    with torch.no_grad():
        compressed[0].weight.mul_(0.5)
    x = (600 * torch.randn(64, 4)).half()  # with a variance of 360,000
    reestimate(compressed, dense, Objective(F.mse_loss, {"calibration": [(x, x)]}), 64)
    torch.testing.assert_close(compressed[1].running_var, torch.full((4,), 0.25).half())


def test_the_distance_of_outputs_in_16_bits_is_that_of_their_numbers(dtype: torch.dtype) -> None:
    wanted = (300 * torch.randn(40, 30)).to(dtype)
    y = (wanted * 1.02).to(dtype)
    expected = (y.double() - wanted.double()).square().sum() / wanted.double().square().sum()
    assert float(relative_error(y, wanted)) == pytest.approx(float(expected), rel=1e-5)


def test_ids_are_counted_whatever_the_precision(dtype: torch.dtype) -> None:
    ids = torch.randint(7, (300, 4))
    objective = Objective(F.cross_entropy, {"calibration": [(ids, torch.zeros(300).long())]})
    found: Mapping[str, Tensor] = input_moments(
        nn.Sequential(nn.Embedding(7, 3)).to(dtype), {"0": ["embedding"]}, objective, 300
    )["0"]
    same(found["embedding"].squeeze(0), torch.bincount(ids.flatten()).double() / ids.numel())
