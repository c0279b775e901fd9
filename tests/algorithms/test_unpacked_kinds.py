"""Every kind of packed matrix is compressed by the same machinery: budget, plan, refit, whitening, file, costs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim
from spectrim.algorithms.refitted import Refitted
from spectrim.decomposers.whitened import WhitenedSVD
from spectrim.surgery.cost import model_cost


class Pooled(nn.Module):
    """A classifier over the mean of what ``body`` puts out at each position."""

    def __init__(self, body: nn.Module, features: int, positions: tuple[int, ...]) -> None:
        super().__init__()
        self.body, self.positions, self.head = body, positions, nn.Linear(features, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        return self.head((out[0] if isinstance(out, tuple) else out).mean(self.positions))


class Attends(nn.Module):
    """Self-attention as a module of one argument."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Squares(nn.Module):
    """A bilinear map of its input with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.product = nn.Bilinear(8, 8, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, x)


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 48, batch_first=True), 2)


def convolutions(kind: Any) -> nn.Module:
    return nn.Sequential(kind(4, 24, 3, padding=1), nn.ReLU(), kind(24, 24, 3, padding=1))


# A model, the shape of one input, and one layer that it must have for the plan.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "attention": (lambda: Pooled(Attends(), 16, (1,)), (6, 16), "body.attention.q_proj"),
    "encoder": (lambda: Pooled(encoder(), 16, (1,)), (6, 16), "body.layers.0.self_attn.v_proj"),
    "lstm": (lambda: Pooled(nn.LSTM(16, 24, batch_first=True), 24, (1,)), (4, 16), "body.hh_l0"),
    "gru": (
        lambda: Pooled(nn.GRU(16, 12, 2, batch_first=True, bidirectional=True), 24, (1,)),
        (4, 16),
        "body.ih_l1_reverse",
    ),
    "conv1d": (lambda: Pooled(convolutions(nn.Conv1d), 24, (2,)), (4, 9), "body.2.conv"),
    "conv3d": (lambda: Pooled(convolutions(nn.Conv3d), 24, (2, 3, 4)), (4, 3, 4, 5), "body.2.conv"),
    "transposed": (lambda: Pooled(convolutions(nn.ConvTranspose2d), 24, (2, 3)), (4, 4, 5), "body.2.conv"),
    "bilinear": (lambda: Pooled(Squares(), 24, (1,)), (3, 8), "body.product.linear"),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Callable[[], nn.Module], list[tuple[Tensor, Tensor]], str]:
    make, shape, layer = CASES[request.param]
    return make, [(torch.randn(8, *shape), torch.randint(5, (8,))) for _ in range(2)], layer


ALGORITHMS = {
    "truncation": spectrim.Truncation(params_kept=0.6),
    "joint": spectrim.Joint(params_kept=0.6, samples=16, refit=16),
    "macs": spectrim.Joint(macs_kept=0.7, samples=16, refit=0),
    "refitted": Refitted(spectrim.Truncation(params_kept=0.6), samples=16),
    "lossless": spectrim.Lossless(gamma=None, verified_tolerance=1e9, verify_on="calibration"),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("decomposer", [spectrim.SVD(), WhitenedSVD(samples=16)], ids=["plain", "whitened"])
def test_it_is_compressed_to_the_budget_and_loads(case: Any, algorithm: str, decomposer: Any, tmp_path: Any) -> None:
    make, batches, _ = case
    model = make()
    result = spectrim.compress(model, calibration=batches, algorithm=ALGORITHMS[algorithm], decomposer=decomposer)
    assert result.plan and not [note for note in result.notes if "left dense" in note]
    kept = {"macs": result.macs_kept, "lossless": 0.0}.get(algorithm, result.params_kept)
    assert kept <= 0.7 if algorithm == "macs" else kept <= 0.6
    assert sum(p.numel() for p in result.model.parameters()) == result.cost.params
    result.save(tmp_path / "x.safetensors")
    loaded, x = spectrim.load(tmp_path / "x.safetensors", into=make()), batches[0][0]
    assert torch.equal(loaded.eval()(x), result.model.eval()(x))


def test_at_nearly_full_rank_it_computes_what_the_model_does(case: Any) -> None:
    make, batches, layer = case
    model, x = make().eval(), batches[0][0]
    matrix = spectrim.compress(model, calibration=batches, plan={layer: 1}).report.set_index("layer").loc[layer]
    with torch.no_grad():
        dense = spectrim.compress(model, calibration=batches, plan={layer: int(matrix.break_even)}).model
        exact = spectrim.compress(dense, calibration=batches, plan={layer: 1})
    errors = [matrix.relative_error, exact.report.set_index("layer").loc[layer].relative_error]
    assert all(0 < error < 1 for error in errors)
    assert (dense.eval()(x) - model(x)).norm() < (exact.model.eval()(x) - model(x)).norm()


def test_both_models_are_counted_in_the_same_way(case: Any) -> None:
    make, batches, _ = case
    model, x = make(), batches[0][0]
    result = spectrim.compress(model, calibration=batches, algorithm=spectrim.Truncation(ratio=1.0))
    before, after = model_cost(model, x), model_cost(result.model, x)
    assert after.params <= before.params and after.macs <= 1.01 * before.macs
    assert result.report.params_before.sum() <= before.params


def test_its_gradients_predict_what_a_small_change_does(case: Any) -> None:
    make, batches, layer = case
    model = make().double().eval()
    batches = [(x.double(), y) for x, y in batches]
    plain = spectrim.compress(model, calibration=batches, algorithm=spectrim.Truncation(params_kept=0.9))
    predicted = plain.report.predicted_change
    assert predicted.notna().all() and predicted.abs().sum() > 0 and layer in set(plain.report.layer)


@pytest.mark.parametrize("name", ["attention", "encoder", "conv1d", "conv3d", "transposed", "bilinear", "lstm"])
def test_the_result_is_exported_to_a_graph(name: str) -> None:
    make, shape, _ = CASES[name]
    x = torch.randn(2, *shape)
    model = spectrim.compress(make(), calibration=[x], algorithm=spectrim.Truncation(ratio=0.5)).model.eval()
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # from torch's own look at a graph that breaks
@pytest.mark.parametrize("name", ["attention", "conv1d", "transposed", "gru"])
def test_the_result_is_compiled(name: str) -> None:
    make, shape, _ = CASES[name]
    x = torch.randn(2, *shape)
    model = spectrim.compress(make(), calibration=[x], algorithm=spectrim.Truncation(ratio=0.5)).model.eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=name != "gru")  # torch breaks graphs at any GRU
    torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-4)


def test_a_training_inside_an_algorithm_ends_in_a_model_that_loads(brief: Any, tmp_path: Any) -> None:
    make, shape, _ = CASES["encoder"]
    batches = [(torch.randn(8, *shape), torch.randint(5, (8,))) for _ in range(2)]
    result = spectrim.compress(
        make(), calibration=batches, train=batches, algorithm=brief(spectrim.SVDTraining(epsilon=5.0))
    )
    assert result.plan
    result.save(tmp_path / "x.safetensors")
    loaded, x = spectrim.load(tmp_path / "x.safetensors", into=make()), batches[0][0]
    torch.testing.assert_close(loaded.eval()(x), result.model.eval()(x), atol=1e-6, rtol=1e-5)


def test_a_dry_run_knows_the_layers(case: Any) -> None:
    make, batches, layer = case
    told = spectrim.compress(make(), calibration=batches, algorithm=ALGORITHMS["joint"], dry_run=True)
    assert layer in set(told.layers.layer)
