"""Train dense, and switch to low-rank factors once the stable ranks of the layers have settled (Cuttlefish).

Cuttlefish (Wang et al., MLSys 2023, arXiv 2305.02538) takes the stable rank ``sum sigma^2 / sigma_1^2`` of each weight
after every epoch. It scales it by the full rank over the stable rank at initialisation. Once no scaled stable rank
moves by more than ``slope`` per epoch, each weight becomes ``U sqrt(S)`` times ``sqrt(S) V^T`` at rank
``ceil(xi * scaled stable rank)``. The first ``dense_first`` layers stay dense. The factors are trained for the rest.

What differs here:

- A slope is the absolute change over the last ``window`` epochs, divided by their number. No epoch of the warm-up
  counts, because little moves there.
- The switch comes after the part ``latest`` of the epochs at the latest.
- The velocity of the factors starts at zero.
- A layer whose rank would lie above break-even stays dense.
- In a grouped convolution the group with the largest stable rank decides.
- The stable rank at initialisation may be that of a random matrix, for a model that is already trained.
- A budget may take the place of ``xi``.
- The layers to leave dense are given, where the paper finds them by measured speed.
- The factors have no BatchNorm between them, and their product has no weight decay of its own.
"""

import math
from dataclasses import field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spectrim.algorithms.shared.budget import costs_of
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.trained import finished, plain_svd, train_by_settings
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.matrix import MatrixSpectrum, View, from_matrix, to_matrix
from spectrim.decomposers.spectrum import Decomposer
from spectrim.errors import UserError
from spectrim.factored import linalg
from spectrim.statistics.objective import Objective
from spectrim.tools.settings import settings
from spectrim.training import svd_weights
from spectrim.training.fit import Callbacks
from spectrim.training.recipe import Recipe


@settings
class Cuttlefish:
    """Train a dense network, watch the stable rank of each layer, and go on with factors of that rank.

    ``xi``: above 0; the rank of a layer over its scaled stable rank.
    ``params_kept``: in (0, 1); the part of the whole model's parameters to keep. The largest ``xi`` that meets it is
        taken. None: ``xi`` is taken as given.
    ``slope``: at least 0, in components per epoch; a layer that moves by no more has settled.
    ``window``: at least 1; the number of epochs over which a slope is taken.
    ``latest``: in (0, 1]; the part of the epochs after which the switch comes in any case.
    ``dense_first``: the number of layers, from the first, that stay dense.
    ``reference``: the source of the stable rank at initialisation. ``start``: the given model, as in the paper if it is
        untrained. ``random``: a random matrix of the same shape, which also suits a trained model.
    ``bounded``: whether the gradient of a factor is divided by the squared norms of the other factor's components,
        where these are above 1. The learning rate at the switch suits the dense network and may be too large for its
        factors.
    ``state``: the file from which an interrupted training is resumed. None: the training starts anew.
    """

    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=8, lr=0.05))
    xi: float = 1.0
    params_kept: float | None = None
    slope: float = 0.1
    window: int = 3
    latest: float = 0.5
    dense_first: int = 1
    reference: Literal["start", "random"] = "random"
    bounded: bool = True
    seed: int = 0
    state: str | None = None

    def __post_init__(self) -> None:
        if not (0 < self.xi < math.inf and 0 <= self.slope < math.inf):
            raise UserError(f"expected xi > 0 and slope >= 0, both finite; got {self.xi} and {self.slope}")
        if self.params_kept is not None and not 0 < self.params_kept < 1:
            raise UserError(f"params_kept must lie in (0, 1), got {self.params_kept}")
        if self.window < 1 or self.dense_first < 0:
            raise UserError(f"expected window >= 1 and dense_first >= 0; got {self.window} and {self.dense_first}")
        if not 0 < self.latest <= 1:
            raise UserError(f"latest, a part of the epochs, must lie in (0, 1], got {self.latest}")

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Train and factor a copy of ``model``.

        The log has one entry per epoch: the ranks of the layers, dense ones at full rank, and their scaled stable
        ranks. Raises ``UserError`` for a decomposer other than ``SVD``, without a ``train`` split, for a budget out of
        reach, and if ``dense_first`` leaves no layer. It also raises it if the loss stops being finite; ``state`` then
        holds the last good epoch.
        """
        decomposer = plain_svd(decomposer, "Cuttlefish")
        objective.given("train")  # raises before the decomposition
        bench = Workbench.of(model, decomposer, objective)
        net = bench.to_train()
        callbacks = _Callbacks(self, net, bench)
        curve = train_by_settings(self, net, objective, decomposer, Callbacks(after_epoch=callbacks.after_epoch))
        return finished(model, net, callbacks.ranks(), curve, decomposer, objective)


def scaled_stable_rank(S_R: Tensor, initial: float) -> float:
    """Return ``full rank * stable rank / initial``, of the group where it is largest.

    It is the full rank if the spectrum is as flat as the initial one. ``initial``: the stable rank at initialisation.
    """
    return S_R.shape[-1] * float(linalg.stable_rank(S_R).max()) / initial


def random_stable_rank(outputs: int, inputs: int) -> float:
    """Return the stable rank of a large random matrix with independent entries.

    Its largest singular value is ``sqrt(O) + sqrt(I)`` times the deviation of the entries (Bai and Yin 1993).
    """
    return outputs * inputs / (math.sqrt(outputs) + math.sqrt(inputs)) ** 2


class _DenseThenFactors(nn.Module):
    """Compute a weight as ``left`` (g, O, I) while ``right`` is empty, and as ``left @ right`` after the switch.

    ``history`` and ``switched`` are buffers, so that the state of a training holds them.

    ``history``: the scaled stable rank at the start and after each dense epoch. NaN for the other epochs.
    """

    def __init__(self, spectrum: MatrixSpectrum, view: View, initial: float, epochs: int) -> None:
        super().__init__()
        self.template, self.view, self.initial = spectrum.template, view, initial
        self.history: Tensor
        self.switched: Tensor
        self.register_buffer("switched", torch.tensor(False))
        self.register_buffer("history", torch.full((epochs + 1,), math.nan))
        self.history[0] = scaled_stable_rank(spectrum.S_R, initial)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        W_OI = to_matrix(weight, self.template, self.view)
        return W_OI.contiguous(), W_OI.new_empty(len(W_OI), 0, W_OI.shape[-1])

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        with torch.autocast(left.device.type, enabled=False):
            weight = from_matrix(left @ right if right.numel() else left, self.template, self.view)
        return weight.contiguous(memory_format=torch.channels_last) if weight.ndim == 4 else weight


class _Watched:
    """Hold one layer that is trained dense first and as factors after the switch."""

    def __init__(self, layer: nn.Module, weight: _DenseThenFactors) -> None:
        svd_weights.set_parametrization(layer, weight)
        self.weight, own = weight, svd_weights.parametrization_of(layer)
        self.left, self.right = own.get_parameter("original0"), own.get_parameter("original1")

    def bound_steps(self) -> None:
        """Keep a step on one factor from moving the weight further than a step on the weight itself would.

        A step on column i of ``left`` moves the weight by the squared norm of row i of ``right``, and the reverse.
        """

        def bounded(gradient: Tensor, other: Tensor, along: int) -> Tensor:
            if not self.right.numel():
                return gradient
            return gradient / other.detach().square().sum(along, keepdim=True).clamp_min(1.0).transpose(-1, -2)

        self.left.register_hook(lambda gradient: bounded(gradient, self.right, -1))
        self.right.register_hook(lambda gradient: bounded(gradient, self.left, -2))

    @property
    def full_rank(self) -> int:
        return min(self.left.shape[-2], self.right.shape[-1])

    @property
    def rank(self) -> int:
        return self.right.shape[-2] or self.full_rank

    def note(self, epoch: int) -> None:
        """Store the stable rank after ``epoch``, counted from 0."""
        S_R = torch.linalg.svdvals(self.left.detach().double())
        self.weight.history[epoch + 1] = scaled_stable_rank(S_R, self.weight.initial)

    def slope(self, epoch: int, window: int) -> float:
        """Return the change of the scaled stable rank per epoch over the last ``window`` epochs.

        It is infinite if there were fewer epochs.
        """
        if epoch + 1 < window:
            return math.inf
        return float((self.weight.history[epoch + 1] - self.weight.history[epoch + 1 - window]).abs()) / window

    @torch.no_grad()
    def factor(self, rank: int, optimizer: torch.optim.SGD) -> None:
        """Replace the weight by its two factors, in place."""
        U_OR, S_R, Vh_RI = linalg.svd(self.left.double())
        root = S_R[..., :rank].sqrt()
        values = U_OR[..., :rank] * root.unsqueeze(-2), root.unsqueeze(-1) * Vh_RI[..., :rank, :]
        for part, value in zip((self.left, self.right), values, strict=True):
            optimizer.state.pop(part, None)
            part.grad, part.data = None, value.to(part).contiguous()


class _Callbacks:
    """Watch the stable ranks after each epoch of the training, and switch to factors once."""

    def __init__(self, chosen: Cuttlefish, net: nn.Module, bench: Workbench) -> None:
        self.chosen, self.costs, self.layers = chosen, costs_of(bench, "params"), dict[str, _Watched]()
        names = list(bench.spectra)[chosen.dense_first :]
        if not names:
            raise UserError(f"dense_first={chosen.dense_first} leaves none of {len(bench.spectra)} layers to factor")
        if chosen.params_kept is not None:  # raises before the training, not at the switch
            self.costs.meet(chosen.params_kept, lambda _: dict.fromkeys(names, 1), low=0.0, high=0.0)
        self.break_even = {name: bench.spectra[name].break_even for name in names}
        for name in names:
            spectrum = bench.spectra[name]
            assert isinstance(spectrum, MatrixSpectrum)  # the decomposer is the plain SVD
            U_OR, S_R, Vh_RI = spectrum.svd
            initial = random_stable_rank(U_OR.shape[-2], Vh_RI.shape[-1])
            if chosen.reference == "start":
                initial = max(1.0, float(linalg.stable_rank(S_R).max()))  # that of a zero matrix is 0
            weight = _DenseThenFactors(spectrum, spectrum.view, initial, chosen.recipe.epochs)
            self.layers[name] = _Watched(net.get_submodule(name), weight)
            if chosen.bounded:
                self.layers[name].bound_steps()

    def after_epoch(self, epoch: int, net: nn.Module, optimizer: torch.optim.SGD) -> dict[str, Any]:
        entry: dict[str, Any] = {"switched": False}
        if not any(watched.weight.switched for watched in self.layers.values()):
            for watched in self.layers.values():
                watched.note(epoch)
            slopes = {name: watched.slope(epoch, self.chosen.window) for name, watched in self.layers.items()}
            warm = epoch + 1 - self.chosen.window >= self.chosen.recipe.warmup * self.chosen.recipe.epochs
            settled = warm and all(slope <= self.chosen.slope for slope in slopes.values())
            entry |= {"stable_ranks": self._stable_ranks(epoch), "switched": settled or epoch + 1 >= self.latest}
        if entry["switched"]:
            self._switch(epoch, optimizer)
        ranks = self.ranks()
        return {"rank": sum(ranks.values()), "ranks": ranks, **entry}

    @property
    def latest(self) -> int:
        """Return the number of epochs after which the switch comes in any case."""
        return max(1, round(self.chosen.latest * self.chosen.recipe.epochs))

    def ranks(self) -> dict[str, int]:
        return {name: watched.rank for name, watched in self.layers.items()}

    def _stable_ranks(self, epoch: int) -> dict[str, float]:
        return {name: float(watched.weight.history[epoch + 1]) for name, watched in self.layers.items()}

    def _switch(self, epoch: int, optimizer: torch.optim.SGD) -> None:
        # A stable rank, and a scaled one, is at least 1 unless the weight is zero.
        stable = {name: max(1.0, value) for name, value in self._stable_ranks(epoch).items()}
        full = {name: watched.full_rank for name, watched in self.layers.items()}

        def ranks_at(xi: float) -> dict[str, int]:
            return {name: max(1, min(full[name], math.ceil(xi * value))) for name, value in stable.items()}

        ranks = ranks_at(self.chosen.xi)
        if self.chosen.params_kept is not None:
            most = max(full[name] / value for name, value in stable.items())
            ranks = self.costs.meet(self.chosen.params_kept, ranks_at, low=0.0, high=most)
        for name, watched in self.layers.items():
            watched.weight.switched.fill_(True)
            if ranks[name] <= self.break_even[name]:
                watched.factor(ranks[name], optimizer)
