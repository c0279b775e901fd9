"""A model whose layers cannot be replaced is refused in one line, and one that runs is left as it was."""

import copy
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spectrim
from spectrim.algorithms.refitted import Refitted
from spectrim.errors import UserError
from spectrim.surgery import find_layers
from spectrim.surgery.given_model import copied, eager, unchanged


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def data() -> Any:
    return [(torch.randn(8, 16), torch.randint(0, 4, (8,)))]


def compress(model: Any, **more: Any) -> spectrim.Compressed:
    return spectrim.compress(model, calibration=data(), algorithm=spectrim.Truncation(ratio=0.5), **more)


def test_a_compiled_model_is_unwrapped() -> None:
    model = plain()
    compiled = torch.compile(model, backend="eager")
    assert eager(compiled) is model and eager(model) is model  # type: ignore[arg-type]
    ours, theirs = compress(compiled), compress(model)
    assert type(ours.model) is nn.Sequential and ours.plan == theirs.plan
    x = torch.randn(3, 16)
    assert torch.equal(ours.model(x), theirs.model(x)) and ours.dense is model
    with pytest.raises(UserError, match=r"pass the eager one, model\._orig_mod"):
        find_layers.factorable(compiled, x)  # type: ignore[arg-type]


def with_compiled_part() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), torch.compile(nn.Linear(16, 4), backend="eager"))  # type: ignore[arg-type]


def compiled_in_place() -> nn.Module:
    model = plain()
    model.compile(backend="eager")
    return model


def scripted() -> nn.Module:
    with pytest.warns(DeprecationWarning):
        return torch.jit.script(plain())


def traced() -> nn.Module:
    with pytest.warns(DeprecationWarning):
        return torch.jit.trace(plain(), torch.randn(2, 16))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (with_compiled_part, "its part 1 is compiled"),
        (compiled_in_place, "the model is compiled"),
        (scripted, "a scripted or traced model has no layers to replace"),
        (traced, "a scripted or traced model has no layers to replace"),
        (lambda: torch.export.export(plain(), (torch.randn(2, 16),)).module(), "an exported model has no layers"),
        (lambda: torch.export.export(plain(), (torch.randn(2, 16),)), "is an ExportedProgram, not a torch.nn.Module"),
        (lambda: nn.Linear, "the model is a type, not a torch.nn.Module"),
        (lambda: plain().to("meta"), "0.weight of the model is on the meta device"),
        (lambda: nn.Sequential(nn.Linear(16, 4), nn.LazyLinear(4)), "1.weight of the model has no shape yet"),
    ],
)
def test_a_model_without_layers_or_values_is_refused_in_one_line(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as refusal:
        compress(make())
    assert "\n" not in str(refusal.value)


def test_a_traced_graph_that_calls_its_layers_is_compressed() -> None:
    model = torch.fx.symbolic_trace(plain())
    result = compress(model)
    assert result.plan and result.model(torch.randn(2, 16)).shape == (2, 4)


class Restless(nn.Module):
    """A model whose every forward pass leaves traces of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 4)
        self.calls, self.seen = 0, torch.zeros(16)
        self.register_buffer("counted", torch.zeros(()))
        self.register_buffer("rebound", torch.zeros(16), persistent=False)
        self.register_buffer("missing", None)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.counted += 1
        self.rebound = self.rebound + x.mean(0)
        self.kept = torch.relu(self.body(x))
        self.register_buffer("late", x.mean(0).detach())
        return self.head(self.kept)


def traces(model: Restless) -> tuple[Any, ...]:
    return model.calls, float(model.counted), hasattr(model, "kept"), *sorted(dict(model.named_buffers()))


def test_a_model_that_keeps_traces_is_left_as_it_was() -> None:
    model = Restless()
    before, rebound = traces(model), model.rebound
    with unchanged(model):
        model(torch.randn(2, 16))
        assert traces(model) != before
    assert traces(model) == before and model.rebound is rebound and not rebound.any()
    assert list(model.state_dict()) == list(Restless().state_dict()) and model.missing is None
    find_layers.factorable(model, torch.randn(2, 16))
    assert traces(model) == before


class Collecting(nn.Module):
    """A model whose every forward pass changes what its attributes hold, and not the attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(16, 4)
        self.history, self.last, self.seen = ["start"], deque([1, 2], maxlen=2), {8}
        self.cache: dict[str, Any] = {"deep": ([], {"calls": 0}), "gone": None}
        self.total, self.parts = torch.zeros(4), [torch.zeros(4)]
        self.own = [self.body.weight]

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        self.history.append(str(len(x)))
        self.last.append(3)
        self.seen.add(len(x))
        keys, counts = self.cache["deep"]
        keys.append(y)
        counts["calls"] += 1
        counts["new"] = y
        self.cache.pop("gone", None)
        self.total += y.detach().sum(0)
        self.parts[0].add_(1)
        return y


def contents(model: Collecting) -> list[Any]:
    plain = model.history, list(model.last), model.seen, model.cache, model.total.tolist(), model.parts[0].tolist()
    return copy.deepcopy(list(plain))


def test_what_the_containers_of_a_model_hold_comes_back() -> None:
    model = Collecting()
    before, held = contents(model), (model.history, model.last, model.cache["deep"][0], model.parts[0], model.own[0])
    with unchanged(model), torch.no_grad():
        model(torch.randn(2, 16))
        assert all(now != then for now, then in zip(contents(model), before, strict=True))
    assert contents(model) == before
    after = model.history, model.last, model.cache["deep"][0], model.parts[0], model.own[0]
    assert all(one is other for one, other in zip(held, after, strict=True))
    result = spectrim.compress(model, calibration=data(), algorithm=spectrim.Joint(params_kept=0.9, samples=8))
    assert result.plan and isinstance(result.report, pd.DataFrame)
    assert contents(model) == before


class Follows(nn.Module):
    """Takes away the mean of what it has seen so far, in eval mode too, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)
        self.calls, self.sizes = 0, list[int]()
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.sizes.append(len(x))
        self.mean.mul_(0.5).add_(x.mean(0), alpha=0.5)
        return self.head(F.relu(self.norm(self.body(x - self.mean))))


JOINT = spectrim.Joint(params_kept=0.8, samples=8)
KINDS: dict[str, dict[str, Any]] = {
    "lossless": {"algorithm": spectrim.Lossless(gamma=None)},
    "verified": {"algorithm": spectrim.Lossless(gamma=None, verified=True, verified_tolerance=9.0)},
    "truncation": {"algorithm": spectrim.Truncation(params_kept=0.8), "batch_norm": "follow"},
    "joint": {"algorithm": JOINT},
    "tolerance": {"algorithm": spectrim.Joint(max_loss_increase=9.0, samples=8)},
    "refined": {"algorithm": Refitted(spectrim.Truncation(rank=4), refine=spectrim.Refinement(samples=32))},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_compressed_model_has_the_state_of_the_given_one_and_is_reported_on(kind: str, tmp_path: Path) -> None:
    """Whatever passes wrote meanwhile: else its outputs would be those of another state."""
    torch.manual_seed(0)
    model = Follows().eval()
    result = spectrim.compress(model, calibration=data() + data(), verification=data(), **KINDS[kind])
    assert result.plan and result.macs_kept < 1
    for own in (model, result.model):
        assert (own.calls, own.sizes) == (0, []) and not own.mean.any()  # type: ignore[union-attr, operator]
    model.calls = 5  # by its owner: a report that is made later leaves it
    assert math.isfinite(result.predicted_change) and model.calls == 5
    if kind == "joint":
        result.save(tmp_path / "all", every_size=True)


def test_a_container_that_holds_itself_is_read_once() -> None:
    model = plain()
    model.loop = [model]  # type: ignore[assignment]
    model.loop.append(model.loop)  # type: ignore[operator, union-attr]
    with unchanged(model):
        model.loop.append(1)  # type: ignore[operator, union-attr]
    assert len(model.loop) == 2  # type: ignore[arg-type]


def test_it_is_left_as_it_was_where_the_block_fails() -> None:
    model = Restless()
    before = traces(model)
    with pytest.raises(RuntimeError), unchanged(model):
        model(torch.randn(2, 16))
        raise RuntimeError
    assert traces(model) == before


@pytest.mark.parametrize("training", [True, False])
def test_compression_changes_neither_state_nor_mode(training: bool) -> None:
    model = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16)), nn.ReLU(), nn.Linear(16, 4)
    ).train(training)
    before = copy.deepcopy(model.state_dict())
    compress(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training == training for module in model)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_rows_that_a_look_up_scales_come_back(kind: Any) -> None:
    torch.manual_seed(0)
    first = kind(20, 6, max_norm=1.0)
    model = nn.Sequential(first, *([nn.Flatten()] if kind is nn.Embedding else []), nn.LazyLinear(12), nn.Linear(12, 5))
    ids = [torch.randint(20, (8, 4)) for _ in range(2)]
    before = first.weight.detach().clone()
    model.eval()(ids[0])
    assert not torch.equal(first.weight, before)  # torch scales them in place, in eval mode too
    with torch.no_grad():
        first.weight.copy_(before)
    data = [(own, torch.randint(5, (8,))) for own in ids]
    joint = spectrim.Joint(params_kept=0.9, samples=8, refit=8)
    result = spectrim.compress(model, calibration=data, algorithm=joint)
    assert result.plan and torch.equal(first.weight, before)


class Locked(nn.Module):
    """A model with a part that cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.guard = plain(), nn.Module()
        self.guard.lock = threading.Lock()  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_what_cannot_be_copied_is_named_in_one_line() -> None:
    with pytest.raises(UserError, match="the attribute guard.lock of the model, a lock, cannot be copied") as refusal:
        compress(Locked())
    assert "\n" not in str(refusal.value)


class Merging(nn.Module):
    """Merges an adapter into a weight in eval mode, and takes it out again in train mode, as LoRA does."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), plain()
        self.down, self.up = nn.Parameter(torch.randn(2, 16)), nn.Parameter(torch.randn(16, 2))
        self.merged = False

    def train(self, mode: bool = True) -> "Merging":
        if self.merged is mode:
            self.body.weight.data += (-1 if mode else 1) * (self.up @ self.down).detach()
            self.merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.head(y if self.merged else y + x @ self.down.T @ self.up.T)


@pytest.mark.parametrize("training", [True, False])
def test_a_model_that_merges_weights_in_eval_mode_is_left_as_it_was(training: bool) -> None:
    model, x = Merging().train(training), torch.randn(4, 16)
    before, outputs = copy.deepcopy(model.state_dict()), model(x)
    result = compress(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training is training and torch.equal(model(x), outputs)
    assert "body" not in result.plan and any("depends on the mode" in note for note in result.notes)
    torch.testing.assert_close(result.model.train()(x), result.model.eval()(x))


class Inside(nn.Module):
    """A layer around another module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.layer, self.inner = nn.Linear(4, 4), inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.layer(x))


def test_a_model_that_is_nested_too_deep_to_be_copied_is_told_what_to_raise() -> None:
    model: nn.Module = nn.Linear(4, 4)
    for _ in range(200):
        model = Inside(model)
    with pytest.raises(UserError, match="raise Python's limit by sys.setrecursionlimit, which is 1000 now"):
        spectrim.compress(model, algorithm=spectrim.Truncation(rank=1))


def test_another_default_device_is_refused_before_anything_is_computed_there() -> None:
    with torch.device("meta"), pytest.raises(UserError, match=r"inside of `with torch.device\('cpu'\):`"):
        compress(plain())
    with torch.device("meta"), torch.device("cpu"):
        assert compress(plain()).plan


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_default_precision_in_which_a_budget_would_be_missed_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    spectrim.compress(plain(), calibration=data(), params_kept=0.6).save(tmp_path / "all", every_size=True)
    with default_dtype(dtype):
        for call in (
            lambda: compress(plain()),
            lambda: spectrim.load(tmp_path / "all", into=plain().float(), params_kept=0.6),
        ):
            with pytest.raises(UserError, match=rf"^torch.set_default_dtype makes new tensors {dtype}, [^\n]*$"):
                call()


@pytest.mark.parametrize("part", [0.6, 0.7, 0.8])
def test_with_double_precision_as_the_default_a_budget_is_met_in_the_precision_of_the_model(part: float) -> None:
    model, splits = plain(), data()
    with default_dtype(torch.float64):
        result = spectrim.compress(model, calibration=splits, params_kept=part)
    assert result.params_kept <= part and {own.dtype for own in result.model.parameters()} == {torch.float32}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("frozen", [True, False])
def test_a_copy_of_a_scripted_part_can_be_trained_as_the_given_one(frozen: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4)))
    for parameter in model[1].parameters():
        parameter.requires_grad_(not frozen)
    own = copied(model)
    assert [p.requires_grad for p in own.parameters()] == [True, True, not frozen, not frozen]
    assert all(p.is_leaf for p in own.parameters())
    assert all(map(torch.equal, own.parameters(), model.parameters()))


@pytest.mark.parametrize("warm", [False, True], ids=["new", "run before"])
def test_hooks_of_a_first_pass_are_registered_once_in_the_given_and_the_compressed_model(warm: bool) -> None:
    class Counting(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            if not getattr(self, "installed", False):
                self.installed = True
                for layer in self:
                    layer.register_forward_hook(lambda *_: seen.append(1) or None)  # type: ignore[func-returns-value]
            return super().forward(x)

    seen = list[int]()
    model, x = Counting(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(3, 16)
    if warm:
        model(x)
    result = compress(model)
    for own in (model, result.model):
        seen.clear()
        own(x)
        assert len(seen) == 3
