"""A model that would compute something else with factored layers, or on a copy, is found before it is compressed."""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim
from spectrim.errors import UserError
from spectrim.surgery.stand_ins import MISLED, UNSTEADY, is_steady, misled, misled_and_steady

HALF = spectrim.Truncation(params_kept=0.5)


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))


def inputs() -> list[Tensor]:
    return [torch.randn(8, 16)]


class AsksForClass(nn.Module):
    """Activates what is a Linear, so that a factored layer would go without."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 32)])
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            if type(layer) is nn.Linear and layer is not self.layers[1]:
                x = torch.relu(x)
        return self.head(x)


def test_a_layer_whose_class_decides_on_the_outputs_stays_dense() -> None:
    torch.manual_seed(0)
    model, (x,) = AsksForClass(), inputs()
    result = spectrim.compress(model, calibration=[x], algorithm=spectrim.Truncation(rank=2))
    assert set(result.plan) == {"layers.1", "head"}
    assert [note.split(":")[0] for note in result.notes if MISLED in note] == ["layers.0", "layers.2"]
    with torch.no_grad():
        for name in result.plan:
            model.get_submodule(name).weight.copy_(result.model.get_submodule(name).weight)  # type: ignore[operator, arg-type]
        torch.testing.assert_close(result.model(x), model(x))


class Opaque:
    """Outputs of a class that no package knows."""

    __slots__ = ("inner",)

    def __init__(self, scores: Tensor) -> None:
        self.inner = {"scores": [scores]}


WRAPPED: list[Callable[[Tensor], Any]] = [
    lambda scores: torch.distributions.Categorical(logits=scores),
    Opaque,
    lambda scores: scores.numpy(),
    lambda scores: {"largest": scores.max().item()},
    lambda scores: torch.complex(torch.zeros_like(scores), scores),
]


@pytest.mark.parametrize("wrap", WRAPPED)
def test_so_it_does_where_the_outputs_are_no_tensors(wrap: Callable[[Tensor], Any]) -> None:
    class Wrapped(AsksForClass):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            return wrap(super().forward(x))

    torch.manual_seed(0)
    result = spectrim.compress(Wrapped(), calibration=inputs(), algorithm=spectrim.Truncation(rank=2))
    assert set(result.plan) == {"layers.1", "head"}


def with_lambda() -> nn.Module:
    model = plain()
    dense = model.forward
    model.forward = lambda x: dense(x)  # type: ignore[method-assign]
    return model


def with_hook() -> nn.Module:
    model = plain()
    extra = model[2]
    model[0].register_forward_hook(lambda _, __, output: output + extra(output))
    return model


class Weakly(nn.Module):
    """Reaches itself by a weak reference, which a copy keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.me = plain(), nn.LayerNorm(8), weakref.ref(self)

    def forward(self, x: Tensor) -> Tensor:
        whole = self.me()
        assert whole is not None
        return whole.norm(self.body(x))


@pytest.mark.parametrize(("make", "called"), [(with_lambda, "0"), (with_hook, "2"), (Weakly, "norm")])
def test_a_model_whose_copy_would_call_the_given_one_is_refused(make: Callable[[], nn.Module], called: str) -> None:
    with pytest.raises(UserError, match=f"still calls '{called}' of the given one") as refusal:
        spectrim.compress(make(), calibration=inputs(), algorithm=HALF)
    assert "\n" not in str(refusal.value)


def with_list() -> nn.Module:
    model = plain()
    parts = [model[2]]
    model[0].register_forward_hook(lambda _, __, output: output + parts[0].forward(output))
    return model


@pytest.mark.parametrize("make", [with_lambda, with_hook, with_list, Weakly])
def test_a_model_that_is_not_run_is_refused_where_a_copy_could_call_the_given_one(
    make: Callable[[], nn.Module],
) -> None:
    with pytest.raises(UserError, match="a function, hook or weak reference in .* the given one.*; pass calibration="):
        spectrim.compress(make(), algorithm=HALF)


class Recording(nn.Module):
    """Keeps what a layer puts out by a hook, and goes on from there."""

    def __init__(self, keep: Callable[["Recording", Tensor], Any], read: Callable[["Recording"], Tensor]) -> None:
        super().__init__()
        self.body, self.head, self.read, self.kept = plain(), nn.Linear(8, 8), read, list[Tensor]()
        self.by_name = dict[str, Tensor]()
        self.body.register_forward_hook(lambda _, __, output: keep(self, output) and None)

    def forward(self, x: Tensor) -> Tensor:
        self.body(x)
        return self.head(self.read(self))


def of_attribute() -> Recording:
    return Recording(lambda model, output: setattr(model, "last", output), lambda model: model.last)  # type: ignore[arg-type, return-value]


def of_list() -> Recording:
    return Recording(lambda model, output: model.kept.append(output), lambda model: model.kept[-1])


def of_dict() -> Recording:
    return Recording(lambda model, output: model.by_name.update(a=output), lambda model: model.by_name["a"])


@pytest.mark.parametrize(("make", "where"), [(of_attribute, "last"), (of_list, "kept"), (of_dict, "by_name")])
def test_a_model_whose_copy_would_read_what_the_given_one_kept_is_refused(
    make: Callable[[], nn.Module], where: str
) -> None:
    model, (x,) = make(), inputs()
    model(x)
    with pytest.raises(UserError, match=f"still writes to '{where}' of the given one"):
        spectrim.compress(model, calibration=[x], algorithm=HALF)


class KeepsItself(nn.Module):
    """Counts its calls and keeps its last output, by a method that a copy takes along."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.calls, self.kept = plain(), 0, list[Tensor]()
        self.body.register_forward_hook(self.keep)

    def keep(self, _: nn.Module, __: Any, output: Tensor) -> None:
        self.calls += 1
        self.kept.append(output)

    def forward(self, x: Tensor) -> Tensor:
        self.body(x)
        return self.kept[-1]


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_copy_reads_what_it_kept_itself(calibrated: bool) -> None:
    model, (x,) = KeepsItself(), inputs()
    model(x)
    result = spectrim.compress(model, algorithm=HALF, **({"calibration": [x]} if calibrated else {}))
    assert torch.equal(result.model(2 * x), result.model.body(2 * x)) and model.calls == len(model.kept) == 1


class ByPartial(nn.Module):
    """Holds a method, a partial function and a hook that a copy takes along."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.extra = plain(), nn.Linear(8, 8)
        self.run: Any = functools.partial(self.body.forward)
        self.body[4].register_forward_hook(self.added)

    def added(self, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output + self.extra(output)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def test_what_a_copy_takes_along_is_no_reason_to_refuse() -> None:
    model, (x,) = ByPartial(), inputs()
    result = spectrim.compress(model, calibration=[x], algorithm=HALF)
    with torch.no_grad():
        before = result.model(x)
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
        assert torch.equal(result.model(x), before) and len(result.plan) == 4


class Noisy(nn.Module):
    """Draws random numbers in eval mode, of torch or of a generator of its own."""

    def __init__(self, generator: torch.Generator | None) -> None:
        super().__init__()
        self.body, self.generator = plain(), generator

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x + torch.randn(x.shape, generator=self.generator))


GENERATORS = [None, torch.Generator().manual_seed(0)]


@pytest.mark.parametrize("generator", GENERATORS)
def test_random_numbers_of_a_model_accuse_no_layer_and_stay_those_of_the_caller(generator: Any) -> None:
    model, (x,) = Noisy(generator), inputs()
    state = torch.get_rng_state()
    assert misled(model, ["body.0", "body.2", "body.4"], x) == {}
    assert torch.equal(torch.get_rng_state(), state)


def test_two_passes_tell_that_a_model_is_neither_misled_nor_unsteady() -> None:
    model, (x,), passes = plain(), inputs(), list[int]()
    model.register_forward_hook(lambda *_: passes.append(1))
    assert misled_and_steady(model, model, ["0", "2", "4"], x) == ({}, True)
    assert len(passes) == 2


@pytest.mark.parametrize("generator", GENERATORS)
def test_a_model_that_draws_random_numbers_is_noted_and_not_fitted_to_another_draw(generator: Any) -> None:
    torch.manual_seed(0)
    data = [(torch.randn(16, 16), torch.randint(8, (16,))) for _ in range(3)]
    refine = spectrim.Refinement(samples=32)
    algorithm = spectrim.Joint(params_kept=0.6, samples=16, refit=32, refine=refine)
    result = spectrim.compress(Noisy(generator), calibration=data, algorithm=algorithm)
    assert [note.split(": ")[0] for note in result.notes] == [UNSTEADY, "not refitted", "not refined"]
    notes = spectrim.compress(plain(), calibration=data, algorithm=algorithm).notes
    assert is_steady(plain(), data[0][0]) and not any(UNSTEADY in note for note in notes)
