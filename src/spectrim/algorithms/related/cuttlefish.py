"""Full-rank training that turns low-rank once the stable ranks have settled (Cuttlefish, Wang et al., MLSys 2023)."""

import copy
import math
from dataclasses import field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spectrim.algorithms.shared.budget import costs_of
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.trained import finished, plain_svd, train_as
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
    """Train the dense net, watch the stable rank of each layer, and go on with factors of that rank.

    Wang et al., MLSys 2023, arXiv 2305.02538: after every epoch the stable rank ``sum sigma^2 / sigma_1^2`` of each
    weight is taken and scaled by full rank over the stable rank at initialisation; once no scaled one moves by more
    than ``slope`` an epoch, every weight but those of the first ``dense_first`` layers becomes ``U sqrt(S)`` times
    ``sqrt(S) V^T`` at rank ``ceil(xi * scaled stable rank)``, which are trained for the rest. That is the paper's.

    Ours: a slope is the absolute change over the last ``window`` epochs, over their number, and none of these is in the
    recipe's warm-up, where little moves; the switch comes after the part ``latest`` of the epochs at the latest; the
    velocity of what is factored begins at zero; a layer whose rank would lie above break-even stays dense; of a
    grouped convolution the group of largest stable rank decides.
    ``reference``: the stable rank at initialisation is that of the given model (``start``, which is the paper's where
    that is untrained), or of a random matrix of the same shape (``random``), which is right for a checkpoint as well.
    ``params_kept``: in place of ``xi``, which is then the largest that meets it. ``bounded``: whether the gradient of a
    factor is divided by the squared norms of the other one's components, where above 1; the learning rate at the
    switch, which suits the dense net, may be too large for its factors without. Left out: the layers to leave dense
    are not found by measuring speed, and there is neither BatchNorm between the factors nor decay of their product.
    ``state``: a file from which an interrupted training goes on; None: it begins anew.
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
            raise UserError(f"xi is above 0 and slope at least 0, both finite; got {self.xi} and {self.slope}")
        if self.params_kept is not None and not 0 < self.params_kept < 1:
            raise UserError(f"params_kept must lie in (0, 1), got {self.params_kept}")
        if self.window < 1 or self.dense_first < 0:
            raise UserError(f"window is at least 1, dense_first at least 0; got {self.window} and {self.dense_first}")
        if not 0 < self.latest <= 1:
            raise UserError(f"latest, a part of the epochs, lies in (0, 1], got {self.latest}")

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Train and factor a copy of ``model``. The log has one entry an epoch: the ranks of the layers, dense ones at
        full rank, and their scaled stable ranks.

        Raises ``UserError`` for another decomposer than ``SVD``, without a ``train`` split, for a budget out of reach,
        where ``dense_first`` leaves no layer, and where the loss stops being finite; ``state`` then holds the last good
        epoch.
        """
        decomposer = plain_svd(decomposer, "Cuttlefish")
        objective.given("train")  # refused now rather than after the decomposition
        bench = Workbench.of(model, decomposer, objective)
        net = copy.deepcopy(model)
        callbacks = _Callbacks(self, net, bench)
        curve = train_as(self, net, objective, decomposer, Callbacks(after_epoch=callbacks.after_epoch))
        return finished(model, net, callbacks.ranks(), curve, decomposer, objective)


def scaled_stable_rank(S_R: Tensor, initial: float) -> float:
    """``full rank * stable rank / initial``, of the group where it is largest: full where the spectrum is flat and so
    was the initial one. ``initial``: the stable rank at initialisation."""
    return S_R.shape[-1] * float(linalg.stable_rank(S_R).max()) / initial


def random_stable_rank(outputs: int, inputs: int) -> float:
    """That of a large matrix of independent entries, whose largest singular value is sqrt(O) + sqrt(I) times their
    deviation (Bai and Yin 1993)."""
    return outputs * inputs / (math.sqrt(outputs) + math.sqrt(inputs)) ** 2


class _DenseThenFactors(nn.Module):
    """A weight that is ``left`` (g, O, I) while ``right`` is empty, and from the switch on ``left @ right``.

    ``history``: the scaled stable rank at the start and after each dense epoch, NaN for others. Like ``switched``, a
    buffer, so that the state of a training tells it.
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
    """One layer that is trained so."""

    def __init__(self, layer: nn.Module, weight: _DenseThenFactors) -> None:
        svd_weights.set_parametrization(layer, weight)
        self.weight, own = weight, svd_weights.parametrization_of(layer)
        self.left, self.right = own.get_parameter("original0"), own.get_parameter("original1")

    def bound_steps(self) -> None:
        """Let no step on one factor move the weight further than one on the weight itself would.

        A step on column i of the left one moves the weight by the squared norm of row i of the right one, and so on.
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
        """Take the stable rank after ``epoch``, counted from 0."""
        S_R = torch.linalg.svdvals(self.left.detach().double())
        self.weight.history[epoch + 1] = scaled_stable_rank(S_R, self.weight.initial)

    def slope(self, epoch: int, window: int) -> float:
        """Of the scaled stable rank over the last ``window`` epochs, an epoch; infinite where there were fewer."""
        if epoch + 1 < window:
            return math.inf
        return float((self.weight.history[epoch + 1] - self.weight.history[epoch + 1 - window]).abs()) / window

    @torch.no_grad()
    def factor(self, rank: int, optimizer: torch.optim.SGD) -> None:
        """Turn the weight into its two factors, in place."""
        U_OR, S_R, Vh_RI = linalg.svd(self.left.double())
        root = S_R[..., :rank].sqrt()
        values = U_OR[..., :rank] * root.unsqueeze(-2), root.unsqueeze(-1) * Vh_RI[..., :rank, :]
        for part, value in zip((self.left, self.right), values, strict=True):
            optimizer.state.pop(part, None)
            part.grad, part.data = None, value.to(part).contiguous()


class _Callbacks:
    """What happens to the layers while they train."""

    def __init__(self, chosen: Cuttlefish, net: nn.Module, bench: Workbench) -> None:
        self.chosen, self.costs, self.layers = chosen, costs_of(bench, "params"), dict[str, _Watched]()
        names = list(bench.spectra)[chosen.dense_first :]
        if not names:
            raise UserError(f"dense_first={chosen.dense_first} leaves none of {len(bench.spectra)} layers to factor")
        if chosen.params_kept is not None:  # refused before the training, not at the switch
            self.costs.meet(chosen.params_kept, lambda _: dict.fromkeys(names, 1), low=0.0, high=0.0)
        self.break_even = {name: bench.spectra[name].break_even for name in names}
        for name in names:
            spectrum = bench.spectra[name]
            assert isinstance(spectrum, MatrixSpectrum)  # the decomposer is the plain SVD
            U_OR, S_R, Vh_RI = spectrum.factors
            initial = random_stable_rank(U_OR.shape[-2], Vh_RI.shape[-1])
            if chosen.reference == "start":
                initial = max(1.0, float(linalg.stable_rank(S_R).max()))  # a zero matrix has 0
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
        """Epochs after which the switch comes, settled or not."""
        return max(1, round(self.chosen.latest * self.chosen.recipe.epochs))

    def ranks(self) -> dict[str, int]:
        return {name: watched.rank for name, watched in self.layers.items()}

    def _stable_ranks(self, epoch: int) -> dict[str, float]:
        return {name: float(watched.weight.history[epoch + 1]) for name, watched in self.layers.items()}

    def _switch(self, epoch: int, optimizer: torch.optim.SGD) -> None:
        # A stable rank is 1 at least, and its scale as well, but for a weight of zeros.
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
