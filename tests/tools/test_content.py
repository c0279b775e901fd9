"""The digest of a model changes with all that its outputs depend on, and with nothing else."""

import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import spectrim
from spectrim.tools.content import content, of_model


class Net(nn.Module):
    """Scales its outputs by a number that a test puts where it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, bias=False)
        nn.init.eye_(self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(self.layer(x))

    def scaled(self, x: Tensor) -> Tensor:
        return x


@dataclass(slots=True)
class Slotted:
    scale: float


def by(read: Callable[[Any], Any]) -> type[Net]:
    return type("Scaling", (Net,), {"scaled": lambda self, x: x * read(self)})


def holding(value: Any, read: Callable[[Any], Any] = lambda own: own) -> Net:
    net = by(lambda self: read(self.held))()
    net.held = value
    return net


def in_a_hidden_buffer(number: float) -> Net:
    net = by(lambda self: self.hidden)()
    net.register_buffer("hidden", torch.tensor(number), persistent=False)
    return net


def in_a_hook(number: float) -> Net:
    net = Net()
    net.layer.register_forward_hook(lambda _, __, output: output * number)
    return net


def in_a_forward_of_its_own(number: float) -> Net:
    net = Net()
    net.forward = MethodType(lambda self, x: self.layer(x) * number, net)  # type: ignore[method-assign]
    return net


def in_a_helper(number: float) -> Net:
    return type("Net", (Net,), {"scaled": lambda self, x: x * number})()


def in_a_property(number: float) -> Net:
    return type("Net", (by(lambda self: self.scale),), {"scale": property(lambda self: number)})()


def in_a_module_that_it_does_not_register(number: float) -> Net:
    net = by(lambda self: self.others[0].bias)()
    net.others = [nn.Linear(1, 3), net, *net.modules()]
    nn.init.constant_(net.others[0].weight, 0)
    nn.init.constant_(net.others[0].bias, number)
    return net


def left_out_of_its_state(number: float) -> Net:
    net = type("Net", (by(lambda self: self.others.bias),), {"state_dict": lambda *_, **__: {}})()
    net.others = nn.Linear(1, 1)
    nn.init.constant_(net.others.bias, number)
    nn.init.constant_(net.others.weight, number)
    return net


WAYS: dict[str, Callable[[float], Net]] = {
    "number": holding,
    "tuple": lambda number: holding((1, number), lambda own: own[1]),
    "nested": lambda number: holding({"a": [{"b": number}]}, lambda own: own["a"][0]["b"]),
    "set": lambda number: holding({number, "a", "b"}, lambda own: sum(part for part in own if part not in ("a", "b"))),
    "tensor": lambda number: holding(torch.tensor([number]), lambda own: own[0]),
    "object": lambda number: holding(SimpleNamespace(scale=number), lambda own: own.scale),
    "slots": lambda number: holding(Slotted(number), lambda own: own.scale),
    "array": lambda number: holding(np.array([number]), lambda own: float(own[0])),
    "scalar": lambda number: holding(np.float32(number), float),
    "queue": lambda number: holding(deque([number]), lambda own: own[0]),
    "range": lambda number: holding(range(int(number)), len),
    "set in an object": lambda number: holding(SimpleNamespace(scales={number}), lambda own: max(own.scales)),
    "function": lambda number: holding(lambda: number, lambda own: own()),
    "partial": lambda number: holding(partial(max, number, 0.0), lambda own: own()),
    "type": lambda number: holding(torch.float16 if number == 2 else torch.float64, lambda own: torch.finfo(own).eps),
    "class": lambda number: type("Net", (by(lambda self: self.scale),), {"scale": number})(),
    "hidden buffer": in_a_hidden_buffer,
    "hook": in_a_hook,
    "own forward": in_a_forward_of_its_own,
    "helper": in_a_helper,
    "property": in_a_property,
    "other module": in_a_module_that_it_does_not_register,
    "left out": left_out_of_its_state,
}


@pytest.mark.parametrize("way", WAYS)
def test_the_digest_of_a_model_changes_with_its_outputs(way: str) -> None:
    make, x = WAYS[way], torch.ones(1, 3)
    assert content(of_model(make(2.0))) == content(of_model(make(2.0))) == content(of_model(make(2.0).eval()))
    assert not torch.equal(make(2.0)(x), make(3.0)(x))
    assert content(of_model(make(2.0))) != content(of_model(make(3.0)))


@pytest.mark.parametrize("way", ["hidden buffer", "object", "hook", "helper"])
def test_a_folder_of_resume_holds_nothing_for_a_model_with_other_outputs(way: str, tmp_path: Path) -> None:
    def result(number: float, **kept: Any) -> Any:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3), WAYS[way](number)).eval()
        data = [(torch.randn(16, 12), torch.randint(3, (16,))) for _ in range(2)]
        refinement = spectrim.Refinement(samples=32)
        algorithm = spectrim.Joint(params_kept=0.6, samples=16, refit=16, refine=refinement)
        return spectrim.compress(net, calibration=data, algorithm=algorithm, **kept)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spectrim.tools.resume.WORTH_SECONDS", 0.0)
        result(2.0, resume=tmp_path)
        again = result(9.0, resume=tmp_path)
    alone = result(9.0)
    assert again.plan == alone.plan
    for key, value in alone.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key])


def test_the_digest_of_a_tensor_that_is_made_of_others_is_that_of_its_parts() -> None:
    """The weights that torchao quantises are such tensors, and allow few other operations."""
    same, one, other = (TwoTensor(torch.ones(3), torch.full((3,), number)) for number in (1.0, 1.0, 2.0))
    assert content([same]) == content([one]) != content([other])
    assert content([one]) != content([torch.ones(3)])


def test_modules_that_hold_each_other_have_a_digest() -> None:
    net = nn.Sequential(*(Net() for _ in range(20)))
    for own in net:
        own.neighbours, own.root = list(net), [net]  # type: ignore[assignment]
        own.call = own.forward
    assert content(of_model(net)) == content(of_model(net))


def test_the_digest_of_a_model_is_the_same_in_another_process() -> None:
    code = (
        "from tools.test_content import WAYS; from spectrim.tools.content import content, of_model\n"
        "print([content(of_model(make(2.0))) for make in WAYS.values()])"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": ":".join([str(Path(__file__).parents[1]), *sys.path]), "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in (1, 2)
    }
    assert len(found) == 1 and found.pop().count(",") == len(WAYS) - 1
