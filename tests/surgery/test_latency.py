"""The table of layer times, by a clock that counts: what is measured on what, and the curves through it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import spectrim
from spectrim.decomposers.spectrum import spectrum_of
from spectrim.decomposers.svd import SVD
from spectrim.errors import UserError
from spectrim.factored.layers import FactoredConv2d
from spectrim.models.resnet import ResNet
from spectrim.surgery import latency
from spectrim.surgery.cost import model_cost


class Clock:
    """Milliseconds: the MACs of all samples, 1 more for each layer, and 5 more for a whole model."""

    def __init__(self) -> None:
        self.asked: list[tuple[nn.Module, torch.Size]] = []

    def __call__(self, module: nn.Module, inputs: Any) -> float:
        x = inputs[0] if isinstance(inputs, tuple) else inputs
        self.asked.append((module, x.shape))
        whole = isinstance(module, nn.Sequential | ResNet)
        layers = [one for one in module.modules() if isinstance(one, nn.Linear | nn.Conv2d)]
        return len(x) * model_cost(module, inputs).macs / 1e6 + len(layers) + 5 * whole


def spectra_of(model: nn.Module, names: list[str]) -> dict[str, Any]:
    return {name: spectrum_of(model.get_submodule(name), SVD()) for name in names}


def test_layers_are_timed_on_what_they_are_given_and_the_rest_is_outside(net: nn.Sequential) -> None:
    clock, x = Clock(), torch.randn(3, 3, 8, 8)
    times = latency.measured(net, spectra_of(net, ["0", "3", "8"]), x, 16, clock)
    conv = 16 * 8 * 8 * 12 * 27 / 1e6
    assert times.layers["0"].dense == pytest.approx(1 + conv)
    assert {shape for module, shape in clock.asked if module is net[3]} == {(16, 12, 8, 8)}
    assert {shape for module, shape in clock.asked if module is net} == {(16, 3, 8, 8)}
    assert times.outside == pytest.approx(5 + 1 + 16 * 256 * 24 / 1e6)  # the linear layer that is not asked for
    assert times.total == pytest.approx(clock(net, latency.repeated(x, 16)))
    own = times.layers["0"]
    assert own.ranks == (1, 3, 4, 6, 8) and own.ranks[-1] == spectra_of(net, ["0"])["0"].break_even
    assert own.factored == pytest.approx([2 + 16 * 64 * rank * (27 + 12) / 1e6 for rank in own.ranks])


def test_layers_alike_are_measured_once_and_share_their_times() -> None:
    model, clock = ResNet(depth=20, width=4, num_classes=10, in_channels=3).eval(), Clock()
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]
    times = latency.measured(model, spectra_of(model, names), torch.randn(2, 3, 8, 8), 2, clock)
    dense = {id(module) for module, _ in clock.asked if isinstance(module, nn.Conv2d)}
    assert len(dense) < len(names) == len(times.layers)
    assert len({own for own in times.layers.values()}) == len(dense)


def test_factors_are_timed_in_the_memory_format_of_the_layer(net: nn.Sequential) -> None:
    clock = Clock()
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    latency.measured(net, spectra_of(net, ["0"]), torch.randn(1, 3, 8, 8), 1, clock)
    (first, *_) = [module for module, _ in clock.asked if isinstance(module, FactoredConv2d)]
    assert first.first.weight.is_contiguous(memory_format=torch.channels_last)


class Twice(nn.Module):
    """Calls its layer on five rows, by keyword, and on one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.fc(input=x).mean(1))


def test_every_call_of_a_layer_counts() -> None:
    model = Twice()
    times = latency.measured(model, spectra_of(model, ["fc"]), torch.randn(2, 5, 8), 2, lambda module, x: 1.0)
    assert times.layers["fc"].dense == 2.0
    assert times.outside == 0.0  # the whole took 1: never less than nothing


def test_curve_is_linear_between_measured_ranks_and_rises_everywhere() -> None:
    times = latency.LayerTimes(dense=9.0, ranks=(1, 3, 5), factored=(2.0, 4.0, 3.0))
    curve = times.curve(7)
    assert curve[:4].tolist() == [0.0, 2.0, 3.0, 4.0] and len(curve) == 8
    assert (curve[:6].diff() > 0).all() and curve[5:].diff().abs().max() == 0
    assert float(curve[5]) == pytest.approx(4.0 + 2 * latency.LEAST_SLOPE * 1.0 / 4)


@pytest.mark.parametrize("times", [[1.0, 1.0, 1.0], [3.0, 2.0, 1.0], [1.0, 5.0, 2.0], [2.0, 3.0, 4.0]])
def test_no_rank_is_promised_faster_than_measured(times: list[float]) -> None:
    found = latency.rising((1, 2, 9), times)
    assert all(after >= before for after, before in zip(found, times, strict=True))
    assert found[0] < found[1] < found[2]
    assert found == times or times != sorted(set(times))


@pytest.mark.parametrize(("most", "expected"), [(1, (1,)), (2, (1, 2)), (9, (1, 3, 5, 7, 9))])
def test_a_handful_of_ranks_is_measured(most: int, expected: tuple[int, ...]) -> None:
    assert latency.ranks_to_measure(most) == expected


def test_the_true_clock_leaves_mode_and_threads_as_they_were(net: nn.Sequential, monkeypatch: Any) -> None:
    monkeypatch.setattr(latency, "SECONDS", 1e-4)
    threads = torch.get_num_threads()
    assert latency.milliseconds(net, torch.randn(2, 3, 8, 8)) > 0
    assert net.training and torch.get_num_threads() == threads


def test_one_lucky_pass_does_not_make_a_model_the_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower model is once by far the fastest, and a burst of other work meets a turn of both."""
    slow, fast = nn.Linear(2, 2), nn.Linear(2, 2)
    times = {id(slow): [1.0, 30.0, *[10.0] * 13], id(fast): [9.0, 27.0, *[9.0] * 13]}
    monkeypatch.setattr(latency, "milliseconds", lambda model, _: times[id(model)].pop(0))
    assert latency.in_turns([slow, fast], torch.ones(1, 2), 1) == [10.0, 9.0]


def test_a_time_of_samples_is_refused_where_steps_come_first() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.GRU(6, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(x)[0][-1])

    data = [(torch.randn(7, 3, 6), torch.randint(4, (3,)))]
    with pytest.raises(UserError, match=r"^a budget in milliseconds takes samples along the first dimension.*wrap it"):
        spectrim.compress(Steps(), calibration=data, algorithm=spectrim.Joint(milliseconds=1.0, samples=3, refit=0))
