"""A recorded step gives what the step gives; one that cannot be recorded is called as it is."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from spectrim.algorithms.related.cuttlefish import Cuttlefish
from spectrim.algorithms.related.haloc import HALOC
from spectrim.algorithms.related.l0_gates import L0Gates
from spectrim.algorithms.svd_training import SVDTraining
from spectrim.data.images import ImageSplit
from spectrim.decomposers.svd import SVD
from spectrim.statistics.objective import Objective
from spectrim.tools.device import device_called
from spectrim.training import cuda_graph
from spectrim.training.cuda_graph import WARM, Replayed, own_stream
from spectrim.training.fit import Training, fit
from spectrim.training.recipe import Recipe

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
STEPS = 3 * WARM


class Counted:
    """Doubles what it is given, in place too, and counts how often it ran as it is."""

    def __init__(self, looks: bool = False) -> None:
        self.ran, self.looks = 0, looks

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self.ran += 1
        return inputs * 2 if self.looks and inputs.sum().item() < 0 else inputs * 2 + targets


def test_on_the_processor_a_step_is_called_as_it_is() -> None:
    step = Counted()
    replayed = Replayed(step)
    with own_stream(torch.device("cpu")):
        found = [replayed(torch.full((2,), float(i)), torch.ones(2)) for i in range(STEPS)]
    assert step.ran == STEPS and [float(one[0]) for one in found] == [2.0 * i + 1 for i in range(STEPS)]


def test_inputs_that_are_no_tensor_are_passed_on() -> None:
    replayed = Replayed(lambda inputs, targets: inputs["x"] + targets)
    assert [float(replayed({"x": torch.ones(())}, i)) for i in range(STEPS)] == [1.0 + i for i in range(STEPS)]


@on_gpu
@pytest.mark.parametrize("looks", [False, True])
def test_a_step_is_replayed_where_it_looks_at_no_value(looks: bool) -> None:
    step, device = Counted(looks), device_called("cuda")
    replayed = Replayed(step)
    with own_stream(device):
        found = [
            float(replayed(torch.full((2,), float(i), device=device), torch.ones(2, device=device))[0])
            for i in range(STEPS)
        ]
    assert found == [2.0 * i + 1 for i in range(STEPS)]
    assert step.ran == (STEPS + 1 if looks else WARM + 1)  # the recording itself is one run


@on_gpu
def test_another_shape_ends_the_replay() -> None:
    step, device = Counted(), device_called("cuda")
    replayed = Replayed(step)
    with own_stream(device):
        for size in [2] * STEPS + [3, 2]:
            found = replayed(torch.ones(size, device=device), torch.ones(size, device=device))
            assert found.tolist() == [3.0] * size
    assert step.ran == WARM + 1 + 2


@pytest.fixture
def images() -> ImageSplit:
    pixels = torch.randint(0, 256, (640, 3, 8, 8), dtype=torch.uint8)
    return ImageSplit(pixels, torch.randint(5, (640,)), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@on_gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_training_is_the_same_replayed(
    net: nn.Module, images: ImageSplit, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained() -> tuple[list[dict], dict[str, Tensor]]:
        recipe = Recipe(epochs=2, lr=0.02, batch_size=32, crop_padding=1, precision=precision)
        torch.manual_seed(0)
        model = type(net)(*net).to("cuda")
        model.load_state_dict(start)
        curve = fit(model, images, Training(recipe, 0))
        return [{**point, "seconds": 0} for point in curve], model.state_dict()

    device_called("cuda")
    start = {name: value.clone() for name, value in net.state_dict().items()}
    curve, weights = trained()
    monkeypatch.setattr(cuda_graph, "WARM", 10**9)
    expected, plain = trained()
    assert [point["loss"] for point in curve] == pytest.approx([point["loss"] for point in expected], rel=1e-3)
    for name, value in plain.items():
        assert torch.allclose(weights[name].float(), value.float(), rtol=1e-2, atol=1e-3), name


@on_gpu
def test_svd_training_is_the_same_replayed(net: nn.Module, images: ImageSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> list[dict[str, Any]]:
        recipe = Recipe(epochs=3, lr=0.02, batch_size=32, crop_padding=1, precision="float32")
        chosen = SVDTraining(recipe=recipe, epsilon=0.05, cool_down=1)
        objective = Objective(cross_entropy, {"calibration": images, "train": images})
        return chosen.compress(net.to("cuda"), SVD("spatial"), objective).log

    device_called("cuda")
    recorded = trained()
    monkeypatch.setattr(cuda_graph, "WARM", 10**9)
    for one, other in zip(recorded, trained(), strict=True):
        assert one["ranks"] == other["ranks"] and one["loss"] == pytest.approx(other["loss"], rel=1e-3)


@on_gpu
@pytest.mark.parametrize("method", [L0Gates, HALOC, Cuttlefish])
def test_what_selects_while_it_trains_is_recorded_in_every_kind_of_step(
    method: Any, net: nn.Module, images: ImageSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[Any] = []
    record = Replayed._record

    def watched(self: Replayed, *given: Any) -> None:
        record(self, *given)
        recorded.append(self.recordable)

    device_called("cuda")
    monkeypatch.setattr(Replayed, "_record", watched)
    recipe = Recipe(epochs=4, lr=0.02, batch_size=32, crop_padding=1, precision="float32")
    objective = Objective(cross_entropy, {"calibration": images, "train": images})
    log = method(recipe=recipe, params_kept=0.5).compress(net.to("cuda"), SVD("spatial"), objective).log
    assert all(recorded) and len(recorded) == (4 + 3 if method is HALOC else 4)
    monkeypatch.setattr(cuda_graph, "WARM", 10**9)
    plain = method(recipe=recipe, params_kept=0.5).compress(net.to("cuda"), SVD("spatial"), objective).log
    for one, other in zip(log, plain, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02)


@on_gpu
def test_steps_of_two_kinds_leave_the_gradients_of_their_own_parameters() -> None:
    first, second = (nn.Parameter(torch.zeros(2, device="cuda")) for _ in range(2))
    kinds: list[int] = []

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        first.grad = second.grad = None
        chosen = (first, second)[kinds[-1]]
        (chosen * inputs).sum().backward()
        return inputs + targets

    replayed = Replayed(step, [first, second])
    with own_stream(torch.device("cuda")):
        for i in range(4 * WARM):
            kinds.append(i % 2)
            replayed(torch.full((2,), float(i), device="cuda"), torch.ones(2, device="cuda"), kinds[-1])
            own, other = (first, second) if i % 2 == 0 else (second, first)
            assert other.grad is None and own.grad is not None and own.grad.tolist() == [float(i)] * 2
