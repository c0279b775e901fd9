"""A model in 16 or 64 bits, or under autocast, is cut as it is in 32 bits, whatever the caller has set."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spectrim
from spectrim.algorithms.joint import Joint
from spectrim.algorithms.refitted import Refitted
from spectrim.algorithms.truncation import Truncation
from spectrim.decomposers.svd import SVD
from spectrim.decomposers.two_sided import TwoSidedSVD
from spectrim.statistics.objective import Objective

Batches = list[tuple[Tensor, Tensor]]


class Net(nn.Module):
    """An embedding, a convolution and linear layers, with norms. It may enter autocast itself."""

    def __init__(self) -> None:
        super().__init__()
        self.autocast: torch.dtype | None = None
        self.words, self.mixing = nn.Embedding(40, 24), nn.Conv1d(24, 24, 3, padding=1)
        self.batch_norm, self.up, self.layer_norm = nn.BatchNorm1d(24), nn.Linear(24, 48), nn.LayerNorm(48)
        self.inside, self.head = nn.Linear(48, 48, bias=False), nn.Linear(48, 6)

    def forward(self, ids: Tensor) -> Tensor:
        with torch.autocast("cpu", self.autocast) if self.autocast else nullcontext():
            x = _in_own(self.batch_norm, self.mixing(self.words(ids).transpose(1, 2))).relu().transpose(1, 2)
            x = _in_own(self.layer_norm, F.gelu(self.up(x)))
            return self.head((x + self.inside(x).relu()).mean(1))


def _in_own(norm: nn.Module, x: Tensor) -> Tensor:
    """Call ``norm`` in the precision of its weights, as models of transformers do that keep norms in float32."""
    weight: Any = norm.weight
    return norm(x.to(weight.dtype)).to(x.dtype)


@pytest.fixture(scope="module")
def given() -> tuple[Net, Batches]:
    """A net after some steps of training, and batches."""
    torch.manual_seed(0)
    net, ids, weight = Net().train(), torch.randint(40, (256, 8)), torch.randn(40, 6)
    answers = weight[ids].sum(1).argmax(1)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for step in range(40):
        chosen = torch.arange(64) + 64 * (step % 4)
        optimizer.zero_grad()
        F.cross_entropy(net(ids[chosen]), answers[chosen]).backward()
        optimizer.step()
    return net.eval(), [(ids[n : n + 32], answers[n : n + 32]) for n in range(0, 192, 32)]


def mixed(net: Net) -> Net:
    net = net.bfloat16()
    for norm in (net.batch_norm, net.layer_norm):
        norm.float()
    return net


def under(dtype: torch.dtype, net: Net) -> Net:
    net.autocast = dtype
    return net


MODELS: dict[str, Callable[[Net], Net]] = {
    "bfloat16": Net.bfloat16,
    "float16": Net.half,
    "float64": Net.double,
    "norms in float32": mixed,
    "autocast to bfloat16": partial(under, torch.bfloat16),
    "autocast to float16": partial(under, torch.float16),
}
SIZES: dict[str, dict[str, Any]] = {
    "joint": {"params_kept": 0.5},
    "by the loss": {"algorithm": Joint(params_kept=0.5, refit_by="loss")},
    "both sides": {"algorithm": Refitted(Truncation(params_kept=0.5)), "decomposer": TwoSidedSVD()},
    "norms follow": {"params_kept": 0.5, "batch_norm": "follow"},
}


def compressed(net: nn.Module, batches: Batches, **asked: Any) -> Any:
    return spectrim.compress(net, calibration=batches, loss=F.cross_entropy, **asked)


def difference(one: Any, other: Any) -> float:
    """Return the sum of the differences of all ranks over the sum of the ranks."""
    ranks = [{name: kept.rank for name, kept in own.plan.items()} for own in (one, other)]
    names = {*ranks[0], *ranks[1]}
    return sum(abs(ranks[0].get(name, 0) - ranks[1].get(name, 0)) for name in names) / sum(ranks[1].values())


@pytest.fixture(scope="module")
def expected(given: tuple[Net, Batches]) -> Callable[[str], Any]:
    """Return a function of the name of a size: the result for the float32 model, with nothing set."""
    return cache(lambda asked: compressed(*given, **SIZES[asked]))


@torch.no_grad()
def error(result: Any, net: Net, batches: Batches) -> float:
    """Return the relative error of the outputs against those of the float32 model."""
    pairs = [(result.model(ids).double(), net(ids).double()) for ids, _ in batches]
    found, expected = (torch.cat(own) for own in zip(*pairs, strict=True))
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("asked", SIZES)
@pytest.mark.parametrize("kind", MODELS)
def test_ranks_and_outputs_are_those_of_the_model_in_32_bits(
    given: tuple[Net, Batches], expected: Callable[[str], Any], kind: str, asked: str, tmp_path: Path
) -> None:
    net, batches = given
    own = MODELS[kind](copy.deepcopy(net))
    found, usual = compressed(own, batches, **SIZES[asked]), expected(asked)
    assert found.plan and difference(found, usual) <= 0.05
    assert error(found, net, batches) <= error(usual, net, batches) + 0.01
    types = {name: value.dtype for name, value in own.state_dict().items()}
    kept = found.model.state_dict()
    assert all(value.dtype == types[name] for name, value in kept.items() if name in types)
    assert {value.dtype for value in found.model.parameters()} == {value.dtype for value in own.parameters()}
    found.save(tmp_path / "small.safetensors")
    loaded = spectrim.load(tmp_path / "small.safetensors", into=copy.deepcopy(own)).state_dict()
    assert loaded.keys() == kept.keys()
    assert all(value.dtype == kept[name].dtype and value.equal(kept[name]) for name, value in loaded.items())


@contextmanager
def setting(turn_on: Callable[[], Any], turn_off: Callable[[], Any]) -> Iterator[None]:
    turn_on()
    try:
        yield
    finally:
        turn_off()


def default_dtype(dtype: torch.dtype) -> AbstractContextManager[None]:
    return setting(partial(torch.set_default_dtype, dtype), partial(torch.set_default_dtype, torch.float32))


def products(precision: str) -> AbstractContextManager[None]:
    return setting(
        partial(torch.set_float32_matmul_precision, precision), partial(torch.set_float32_matmul_precision, "highest")
    )


def default_device(device: str) -> AbstractContextManager[None]:
    return setting(partial(torch.set_default_device, device), partial(torch.set_default_device, None))


def deterministic() -> AbstractContextManager[None]:
    return setting(
        partial(torch.use_deterministic_algorithms, True), partial(torch.use_deterministic_algorithms, False)
    )


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float64 by default": partial(default_dtype, torch.float64),
    "the CPU by default": partial(default_device, "cpu"),
    "deterministic": deterministic,
    "without gradients": torch.no_grad,
    "inference mode": torch.inference_mode,
}
COARSE: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast to bfloat16": partial(torch.autocast, "cpu", torch.bfloat16),
    "autocast to float16": partial(torch.autocast, "cpu", torch.float16),
    "coarse products": partial(products, "medium"),
}


@pytest.mark.parametrize("asked", SIZES)
@pytest.mark.parametrize("around", SETTINGS)
def test_what_the_caller_has_set_changes_nothing(
    given: tuple[Net, Batches], expected: Callable[[str], Any], around: str, asked: str
) -> None:
    (net, batches), usual = given, expected(asked)
    with SETTINGS[around]():
        found = compressed(net, batches, **SIZES[asked])
        predicted = found.predicted_change
    assert found.plan == usual.plan and predicted == pytest.approx(usual.predicted_change, rel=1e-6)
    for name, value in usual.model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("asked", SIZES)
@pytest.mark.parametrize("around", COARSE)
def test_what_makes_the_model_coarse_hardly_changes_its_ranks(
    given: tuple[Net, Batches], expected: Callable[[str], Any], around: str, asked: str
) -> None:
    (net, batches), usual = given, expected(asked)
    with COARSE[around]():
        found = compressed(net, batches, **SIZES[asked])
        assert found.predicted_change == pytest.approx(usual.predicted_change, rel=0.05)
    assert difference(found, usual) <= 0.05
    assert error(found, net, batches) <= error(usual, net, batches) + 0.01
    assert {value.dtype for value in found.model.parameters()} == {torch.float32}


class Spectral(nn.Module):
    """A model with a layer of complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.waves, self.last = nn.Linear(12, 16), nn.Linear(9, 9, dtype=torch.complex64), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.fft.irfft(self.waves(torch.fft.rfft(self.first(x))), 16))


def test_a_layer_with_complex_weights_stays_dense_and_is_noted() -> None:
    batches = [(torch.randn(20, 12), torch.randint(4, (20,))) for _ in range(2)]
    result = compressed(Spectral(), batches, params_kept=0.8)
    assert "waves" not in result.plan and result.plan
    assert any(note.startswith("waves: ") and "\n" not in note and "complex" in note for note in result.notes)
    assert result.model.waves.weight.dtype == torch.complex64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factors", ["plain", "pivoted"])
def test_factors_are_rounded_once(given: tuple[Net, Batches], dtype: torch.dtype, factors: Any) -> None:
    net = copy.deepcopy(given[0]).to(dtype)
    asked = {"algorithm": Truncation(ratio=0.5), "decomposer": SVD(factors=factors)}
    found, exact = (compressed(own, given[1], **asked).model.state_dict() for own in (net, copy.deepcopy(net).double()))
    factored = [name for name in found if ".first." in name or ".second." in name]
    assert factored
    for name in factored:
        assert found[name].dtype == (dtype if exact[name].is_floating_point() else exact[name].dtype)
        assert found[name].equal(exact[name].to(found[name].dtype)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", [F.cross_entropy, nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)])
def test_the_loss_of_a_model_in_16_bits_has_the_digits_of_float32(
    given: tuple[Net, Batches], dtype: torch.dtype, loss: Any
) -> None:
    net, batches = copy.deepcopy(given[0]).to(dtype), given[1]
    with torch.no_grad():
        expected = [loss(net(ids).double(), answers) for ids, answers in batches]
    found = Objective(loss, {"calibration": batches}).evaluate(net).loss
    assert found == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)
