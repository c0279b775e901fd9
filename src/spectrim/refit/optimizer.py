"""The optimizer of a refinement: steps of equal relative length for matrices, Adam for vectors."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

VECTORS = 0.1  # learning rate of Adam over that of the matrices


class Optimizer:
    """Muon on matrices (Jordan et al., 2024, as in ``torch.optim``), and Adam on biases and on weights of a norm.

    A step of Muon has no preferred direction: all singular values of it are about equal. So small components move as
    fast as large ones, which Adam does not reach. A step moves a matrix by ``lr`` of the norm that it had at first.
    Kernels count as matrices, with one row an output.

    ``weights``: by name.
    ``lr``: without unit. Adam takes a tenth of it.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], lr: float) -> None:
        self.weights = weights
        self.flat = {name: _flat(weight) for name, weight in weights.items() if weight.dim() > 1}
        vectors = [weight for name, weight in weights.items() if name not in self.flat]
        groups = [{"params": [matrix], "lr": _rate(matrix, lr)} for matrix in self.flat.values()]
        given: list[torch.optim.Optimizer] = [torch.optim.Muon(groups, weight_decay=0)] if groups else []
        self.given = [*given, torch.optim.Adam(vectors, VECTORS * lr)] if vectors else given
        self.peaks = [[group["lr"] for group in own.param_groups] for own in self.given]
        self._forget()

    def step(self, part: float) -> None:
        """Move the weights along their gradients, at ``part`` of the learning rate. Forget the gradients."""
        for name, matrix in self.flat.items():
            gradient = self.weights[name].grad
            matrix.grad = None if gradient is None else gradient.flatten(1)
        for own, peaks in zip(self.given, self.peaks, strict=True):
            for group, peak in zip(own.param_groups, peaks, strict=True):
                group["lr"] = part * peak
            own.step()
        with torch.no_grad():
            for name, matrix in self.flat.items():
                self.weights[name].copy_(matrix.view(self.weights[name].shape))
        self._forget()

    def _forget(self) -> None:
        for weight in self.weights.values():
            weight.grad = None

    def state(self) -> dict[str, Tensor]:
        """Return the weights, and what is remembered of each, to take up later by ``load``."""
        found: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            found[f"weight:{name}"] = weight.detach()
            found |= {f"{key}:{name}": value for key, value in sorted(self._remembered(name).items())}
        return found

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take up what ``state`` returned."""
        for key, value in state.items():
            kind, _, name = key.partition(":")
            weight = self.weights[name]
            if kind != "weight":
                self._remembered(name)[kind] = value if kind == "step" else value.to(weight.device)
                continue
            weight.copy_(value)
            if name in self.flat:
                self.flat[name].copy_(weight.flatten(1))

    def _remembered(self, name: str) -> dict[str, Tensor]:
        """Return what torch keeps of a weight."""
        matrix = self.flat.get(name)
        return self.given[-1].state[self.weights[name]] if matrix is None else self.given[0].state[matrix]


def _flat(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().flatten(1).clone())


def _rate(matrix: Tensor, lr: float) -> float:
    """Return the learning rate of Muon with which a step moves ``matrix`` by ``lr`` of its norm."""
    rows, columns = matrix.shape
    own = math.sqrt(max(1, rows / columns))  # the factor by which torch multiplies it
    return lr * float(matrix.detach().norm()) / math.sqrt(min(rows, columns)) / own
