"""A compressed model computes what its dense twin does with the products of the factors as weights, however it is made.

The twin is made here: it is a copy of the given model, into which the map of each factored layer is written.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import spectrim
from spectrim.algorithms.refitted import Refitted

FEATURES, CLASSES = 12, 5


class Generated(nn.Module):
    """The weight of its first step comes from layers that see a code in place of the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.made = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, FEATURES * 8))
        self.code = nn.Parameter(torch.randn(4))
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.made(self.code).view(8, FEATURES))
        return self.head(F.relu(self.body(F.relu(y))))


class Iterated(nn.Module):
    """Repeats a layer until nothing moves any more, which takes another number of calls for each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.again, self.head = nn.Linear(FEATURES, 16), nn.Linear(16, 16), nn.Linear(16, CLASSES)
        nn.init.normal_(self.again.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        start, before = self.start(x), torch.zeros(len(x), 16)
        for _ in range(30):
            now = torch.tanh(self.again(before) + start)
            if (now - before).abs().max() < 1e-4:
                break
            before = now
        return self.head(now)


class Checkpointed(nn.Module):
    """Computes a part of itself a second time on the way back."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(FEATURES, 24), nn.Linear(24, 24), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y: Any = checkpoint(self.part, F.relu(self.first(x)), use_reentrant=False)
        return self.head(y)

    def part(self, x: Tensor) -> Tensor:
        return F.relu(self.second(x))


class Quantised(nn.Module):
    """Passes the nearest code on and the gradient by it, and counts the use of each code, in eval mode too."""

    used: Tensor
    codes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(FEATURES, 12), nn.Linear(12, CLASSES)
        self.register_buffer("codes", torch.randn(16, 12))
        self.register_buffer("used", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        z = self.encode(x)
        nearest = torch.cdist(z, self.codes).argmin(1)
        self.used.index_add_(0, nearest, torch.ones(len(x)))
        return self.decode(z + (self.codes[nearest] - z).detach())


class Tasks(nn.Module):
    """Has a head for each task, and takes the name of the task beside the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, 24)
        self.heads = nn.ModuleDict({"a": nn.Linear(24, CLASSES), "b": nn.Linear(24, CLASSES)})

    def forward(self, x: Tensor, task: str) -> Tensor:
        return self.heads[task](F.relu(self.body(x)))


class Tree(nn.Module):
    """Walks nested lists, so that a layer is called once a node."""

    def __init__(self) -> None:
        super().__init__()
        self.leaf, self.join, self.head = nn.Linear(FEATURES, 16), nn.Linear(32, 16), nn.Linear(16, CLASSES)

    def node(self, tree: Any) -> Tensor:
        if isinstance(tree, Tensor):
            return self.leaf(tree)
        return torch.tanh(self.join(torch.cat([self.node(part) for part in tree], -1)))

    def forward(self, trees: list[Any]) -> Tensor:
        return torch.stack([self.head(self.node(tree)) for tree in trees])


class Messages(nn.Module):
    """Passes messages along the edges of graphs, and adds up the nodes of each."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.update = nn.Linear(2 * FEATURES, 24), nn.Linear(24 + FEATURES, 12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        sent = F.relu(self.message(torch.cat([x[edges[0]], x[edges[1]]], 1)))
        got = torch.zeros(len(x), 24).index_add_(0, edges[1], sent)
        y = F.relu(self.update(torch.cat([x, got], 1)))
        return self.head(torch.zeros(int(graph.max()) + 1, 12).index_add_(0, graph, y))


class Kept(nn.Module):
    """Reads the outputs of layers where hooks have put them, one of which scales them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(FEATURES, 24), nn.Linear(24, 24), nn.Linear(48, CLASSES)
        self.kept: dict[str, Tensor] = {}
        self.first.register_forward_hook(lambda module, args, output: 1.5 * output)
        for name in ("first", "second"):
            self.get_submodule(name).register_forward_hook(partial(self.keep, name))

    def keep(self, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        self.kept[name] = output

    def forward(self, x: Tensor) -> Tensor:
        self.second(F.relu(self.first(x)))
        return self.head(torch.cat([self.kept["first"], self.kept["second"]], 1))


@dataclass
class Scores:
    logits: Tensor
    kind: str = "scores"


class Emptying(nn.Module):
    """Takes a mapping as its one argument, empties it, works in place on what it held, and gives a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(FEATURES, 24), nn.Linear(24, CLASSES)

    def forward(self, batch: dict[str, Any]) -> Scores:
        x = batch.pop("x")
        x *= 2
        return Scores(self.head(F.relu(self.body(x))))


class Leaving(nn.Module):
    """Computes the second part for those samples alone of which the first is not certain."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.early = nn.Linear(FEATURES, 24), nn.Linear(24, CLASSES)
        self.late, self.head = nn.Linear(24, 24), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.body(x))
        out = self.early(y).clone()
        unsure = out.softmax(1).amax(1) < 0.3
        out[unsure] = self.head(F.relu(self.late(y[unsure])))
        return out


class Case(NamedTuple):
    """A model, what makes the inputs of a batch of samples, and the number of these."""

    model: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    samples: int = 16


def samples(count: int) -> Tensor:
    return torch.randn(count, FEATURES)


def trees(count: int) -> tuple[list[Any]]:
    one, two, three = (torch.randn(FEATURES) for _ in range(3))
    return ([[one, [two, three]], [two, one]] * (count // 2),)


def graphs(count: int) -> tuple[Tensor, Tensor, Tensor]:
    nodes = 5 * count
    return samples(nodes), torch.randint(nodes, (2, 3 * nodes)), torch.arange(nodes) // 5


CASES = {
    "generated weights": Case(Generated, samples),
    "a fixed point": Case(Iterated, samples),
    "checkpoints": Case(Checkpointed, samples),
    "codes": Case(Quantised, samples),
    "tasks by name": Case(Tasks, lambda count: {"x": samples(count), "task": "ab"[int(torch.randint(2, ()))]}),
    "trees": Case(Tree, trees, 6),
    "graphs": Case(Messages, graphs, 4),
    "hooks": Case(Kept, samples),
    "a mapping that is emptied": Case(Emptying, lambda count: ({"x": samples(count), "names": ["s"] * count},)),
    "early exits": Case(Leaving, samples),
}


def outputs_of(model: nn.Module, inputs: Any) -> Tensor:
    inputs = copy.deepcopy(inputs)
    with torch.no_grad():
        found = (
            model(**inputs)
            if isinstance(inputs, dict)
            else model(*(inputs if isinstance(inputs, tuple) else (inputs,)))
        )
    return found.logits if isinstance(found, Scores) else found


def loss(outputs: Any, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.logits if isinstance(outputs, Scores) else outputs, targets)


@torch.no_grad()
def twin_of(given: nn.Module, result: Any) -> nn.Module:
    """The given model with the map of each factored layer in its weight and bias, read off the unit vectors."""
    twin = copy.deepcopy(given)
    for name in result.plan:
        small, dense = result.model.get_submodule(name), twin.get_submodule(name)
        for kind in ("_forward_hooks", "_forward_pre_hooks"):
            small = copy.deepcopy(small)
            getattr(small, kind).clear()
        bias = small(torch.zeros(1, dense.in_features))
        dense.weight.copy_((small(torch.eye(dense.in_features)) - bias).T)  # type: ignore[operator]
        dense.bias.copy_(bias[0])  # type: ignore[operator]
    return twin


ALGORITHMS = {
    "knapsack": {"algorithm": "knapsack", "params_kept": 0.75},
    "lossless": {"algorithm": spectrim.Lossless(gamma=None)},
    "refitted": {"algorithm": Refitted(spectrim.Truncation(ratio=0.5), samples=48)},
}


@pytest.mark.parametrize("settings", ALGORITHMS.values(), ids=ALGORITHMS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_computes_what_its_twin_does(case: Case, settings: Any, tmp_path: Path) -> None:
    model = case.model().eval()
    data = [(case.inputs(case.samples), torch.randint(CLASSES, (case.samples,))) for _ in range(4)]
    before, inputs = copy.deepcopy(model.state_dict()), case.inputs(case.samples)
    result = spectrim.compress(model, calibration=data, loss=loss, **settings)
    assert result.plan and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    count = sum(p.numel() for p in result.model.parameters()) / sum(p.numel() for p in model.parameters())
    assert result.params_kept == pytest.approx(count) and count <= settings.get("params_kept", 1)
    twin = twin_of(model, result)
    torch.testing.assert_close(outputs_of(result.model, inputs), outputs_of(twin, inputs), atol=1e-4, rtol=1e-4)
    result.save(tmp_path / "small.safetensors")
    torch.manual_seed(0)
    loaded = spectrim.load(tmp_path / "small.safetensors", into=case.model().eval())
    torch.testing.assert_close(outputs_of(loaded, inputs), outputs_of(result.model, inputs))
    assert result.report["predicted_change"].notna().all()
