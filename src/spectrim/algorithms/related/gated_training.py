"""Train layers as ``U diag(S * gate) Vh``, with gates learnt beside the weights, for ``HALOC`` and ``L0Gates``.

The loss is that of the task plus ``strength`` times a penalty on open gates. After the gated epochs the gates are
multiplied into S, closed components are dropped, and the factors are trained for the rest.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.algorithms.shared.budget import Costs, costs_of
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.trained import finished, plain_svd, train_by_settings
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.matrix import MatrixSpectrum
from spectrim.decomposers.spectrum import Decomposer
from spectrim.errors import UserError
from spectrim.statistics.objective import Objective
from spectrim.tools.settings import settings
from spectrim.training import svd_weights
from spectrim.training.fit import Callbacks
from spectrim.training.recipe import Recipe
from spectrim.training.svd_weights import SVDWeight


class Learning(IntEnum):
    """Say what a training step updates. In the last stage the gates are gone, multiplied into S."""

    ALL = 0
    WEIGHTS = 1
    GATES = 2
    WITHOUT_GATES = 3


class Gate(nn.Module, ABC):
    """Map learnt ``logits`` to a gate in [0, 1] for each of the R components of a layer.

    ``forward(logits)`` has shape (R,). It is random in training mode, and the gate that would be kept in eval mode.

    ``saved``: what the layer saves at each rank from 0, as a part of the cost of the whole model.
    """

    saved: Tensor

    def set_saved(self, saved: Tensor) -> None:
        self.register_buffer("saved", saved, persistent=False)

    @abstractmethod
    def first_logits(self) -> Tensor:
        """Return the logits at the start of the training."""


class GatedWeight(nn.Module):
    """Compute the weight of a Linear or Conv2d as ``U diag(S * gate) Vh``. The parameters are U, S, Vh and the logits.

    The stage of the learning is part of the module's state, so that the state of a training holds it.
    """

    def __init__(self, spectrum: MatrixSpectrum, gate: Gate) -> None:
        super().__init__()
        self.product = SVDWeight(spectrum)
        self.gate: Gate = gate
        self.learning = Learning.ALL

    def get_extra_state(self) -> Tensor:
        return torch.tensor(int(self.learning))

    def set_extra_state(self, state: Tensor) -> None:
        self.learning = Learning(int(state))

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        return *self.product.right_inverse(weight), self.gate.first_logits().to(weight)

    def forward(self, U_OR: Tensor, S_R: Tensor, Vh_RI: Tensor, logits: Tensor) -> Tensor:
        if self.learning == Learning.WITHOUT_GATES:
            return self.product(U_OR, S_R, Vh_RI)
        if self.learning == Learning.GATES:
            U_OR, S_R, Vh_RI = U_OR.detach(), S_R.detach(), Vh_RI.detach()
        with torch.autocast(S_R.device.type, enabled=False):
            gated_R = S_R * self.gate(self.learnt(logits))
        return self.product(U_OR, gated_R, Vh_RI)

    def learnt(self, logits: Tensor) -> Tensor:
        """Return the logits, detached in steps that update the weights alone."""
        return logits.detach() if self.learning == Learning.WEIGHTS else logits


@settings
class GatedTraining(ABC):
    """Train weights and gates together on the ``train`` split, drop what the gates close, and train what is left.

    U and Vh have no weight decay. That of S equals that of the weight as long as U and Vh are orthonormal.

    ``strength``: at least 0; the weight of the penalty in the loss.
    ``rate``: above 0; the learning rate of the logits over that of the weights.
    ``params_kept``, ``macs_kept``: in (0, 1); at most one; the part of the whole model to keep, met from below. None:
        the penalty decides.
    ``refine``: in [0, 1); the last part of the epochs, which trains what is kept without gates.
    ``state``: the file from which an interrupted training is resumed. None: the training starts anew.
    """

    recipe: Recipe = field(default_factory=lambda: Recipe(epochs=8, lr=0.05))
    strength: float = 1.0
    rate: float = 30.0
    params_kept: float | None = None
    macs_kept: float | None = None
    refine: float = 0.2
    seed: int = 0
    state: str | None = None

    def __post_init__(self) -> None:
        budgets = [share for share in (self.params_kept, self.macs_kept) if share is not None]
        if len(budgets) > 1 or not all(0 < share < 1 for share in budgets):
            raise UserError(f"set at most one of params_kept and macs_kept, in (0, 1); got {budgets}")
        if not (0 <= self.strength < math.inf and 0 < self.rate < math.inf):
            raise UserError(f"expected strength >= 0 and rate > 0, both finite; got {self.strength} and {self.rate}")
        if not 0 <= self.refine < 1:
            raise UserError(f"refine, a part of the epochs, must lie in [0, 1), got {self.refine}")

    @property
    def gated_epochs(self) -> int:
        """Return the number of epochs with gates, at least 1."""
        return max(1, self.recipe.epochs - round(self.refine * self.recipe.epochs))

    @abstractmethod
    def gate(self, spectrum: MatrixSpectrum, weight: int) -> Gate:
        """Return the gates of one layer. ``weight``: the number of parameters of its dense weight."""

    @abstractmethod
    def penalty(self, layers: Mapping[str, "GatedLayer"], requested: float | None) -> Tensor:
        """Return the price of open gates, a scalar.

        On a GPU it is recorded with the step. It must not depend on the value of a tensor through Python, nor change
        one.
        """

    def next_learning(self, learning: Learning) -> Learning:
        """Return what the next step updates, after a step that updated ``learning``."""
        return learning

    @abstractmethod
    def kept(self, layers: Mapping[str, "GatedLayer"], costs: Costs, requested: float | None) -> dict[str, Tensor]:
        """Return the final factor on each component of each layer, 0 for a component that is dropped. Shape (R,)."""

    def compress(self, model: nn.Module, decomposer: Decomposer, objective: Objective) -> Compressed:
        """Train and cut a copy of ``model``.

        The log has one entry per epoch: the mean of each term of the loss, and the number of open gates of each layer.
        Raises ``UserError`` for a decomposer other than ``SVD``, without a ``train`` split, for a budget out of reach,
        and if the loss stops being finite; ``state`` then holds the last good epoch.
        """
        decomposer = plain_svd(decomposer, type(self).__name__)
        objective.given("train")  # raises before the decomposition
        bench = Workbench.of(model, decomposer, objective)
        net = bench.to_train()
        callbacks = _Callbacks(self, net, bench)
        curve = train_by_settings(
            self,
            net,
            objective,
            decomposer,
            Callbacks(callbacks.penalties, callbacks.before_step, callbacks.after_epoch),
            undecayed=callbacks.undecayed(),
        )
        return finished(model, net, callbacks.worthwhile(), curve, decomposer, objective)


class GatedLayer:
    """Hold one layer that is trained with gates."""

    def __init__(self, layer: nn.Module, rate: float) -> None:
        self.layer = layer
        own = svd_weights.parametrization_of(layer)
        weight = own.get_submodule("0")
        assert isinstance(weight, GatedWeight)
        self.weight, self.parameter = weight, own.get_parameter("original3")
        self.parameter.register_hook(lambda gradient: rate * gradient)  # acts as a learning rate of its own

    @property
    def gate(self) -> Gate:
        return self.weight.gate

    @property
    def logits(self) -> Tensor:
        """Return the logits, detached in steps that do not update them."""
        return self.weight.learnt(self.parameter)

    @torch.no_grad()
    def eval_gates(self) -> Tensor:
        """Return the gates that would be kept now. Shape (R,)."""
        mode = self.weight.gate.training
        gates = self.weight.gate.eval()(self.parameter)
        self.weight.gate.train(mode)
        return gates

    @property
    def learning(self) -> Learning:
        return self.weight.learning

    @learning.setter
    def learning(self, value: Learning) -> None:
        self.weight.learning = value

    @torch.no_grad()
    def absorb_gates(self, gates: Tensor, optimizer: torch.optim.SGD) -> None:
        """Multiply the gates into S and drop the components that they close, in place."""
        svd_weights.svd_of(self.layer).S_R.mul_(gates)
        self.learning = Learning.WITHOUT_GATES
        svd_weights.orthogonalise(self.layer, optimizer)  # components with a closed gate come last
        svd_weights.truncate(self.layer, int(gates.count_nonzero()), optimizer)


class _Callbacks:
    """Set what each step updates, add the penalty, and absorb the gates after the gated epochs."""

    def __init__(self, chosen: GatedTraining, net: nn.Module, bench: Workbench) -> None:
        self.chosen, self.net = chosen, net
        self.costs = costs_of(bench, "params" if chosen.macs_kept is None else "macs")
        self.requested = chosen.params_kept if chosen.macs_kept is None else chosen.macs_kept
        self.layers: dict[str, GatedLayer] = {}
        for name, spectrum in bench.spectra.items():
            assert isinstance(spectrum, MatrixSpectrum)  # the decomposer is the plain SVD
            layer = net.get_submodule(name)
            gate = chosen.gate(spectrum, layer.get_parameter("weight").numel())
            gate.set_saved(self.costs.saved(name))
            svd_weights.set_parametrization(layer, GatedWeight(spectrum, gate))
            svd_weights.bound_steps(layer)
            self.layers[name] = GatedLayer(layer, chosen.rate)
        if self.requested is not None:
            # Raises before the training if the budget is out of reach.
            chosen.kept(self.layers, self.costs, self.requested)

    @property
    def without_gates(self) -> bool:
        return next(iter(self.layers.values())).learning is Learning.WITHOUT_GATES

    def ranks(self) -> dict[str, int]:
        return {name: svd_weights.svd_of(gated.layer).S_R.shape[-1] for name, gated in self.layers.items()}

    def undecayed(self) -> list[str]:
        """Return the names of the parameters without weight decay."""
        factors = {name: svd_weights.svd_of(gated.layer) for name, gated in self.layers.items()}
        spared = [(own.U_OR, own.Vh_RI, self.layers[name].parameter) for name, own in factors.items()]
        chosen = {id(part) for parts in spared for part in parts}
        return [name for name, parameter in self.net.named_parameters() if id(parameter) in chosen]

    def worthwhile(self) -> dict[str, int]:
        """Return the ranks; the full rank, which means dense, where factors cost no less than the dense layer."""
        ranks, costs = self.ranks(), self.costs
        return {name: rank if costs.pays(name, rank) else costs.full(name) for name, rank in ranks.items()}

    def penalties(self, epoch: int) -> dict[str, Tensor]:
        if self.without_gates:
            return {}
        return {"penalty": self.chosen.strength * self.chosen.penalty(self.layers, self.requested)}

    def before_step(self) -> Learning:
        for gated in self.layers.values():
            if gated.learning is not Learning.WITHOUT_GATES:
                gated.learning = self.chosen.next_learning(gated.learning)
        return next(iter(self.layers.values())).learning

    def after_epoch(self, epoch: int, net: nn.Module, optimizer: torch.optim.SGD) -> dict[str, Any]:
        if epoch + 1 == self.chosen.gated_epochs:
            for name, gates in self.chosen.kept(self.layers, self.costs, self.requested).items():
                self.layers[name].absorb_gates(gates, optimizer)
        open_gates = {name: int(gated.eval_gates().count_nonzero()) for name, gated in self.layers.items()}
        ranks = self.ranks() if self.without_gates else open_gates
        return {"rank": sum(ranks.values()), "ranks": ranks}
