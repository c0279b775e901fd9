"""Start a training inside an algorithm, and return the compressed model that it ends in."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.decomposers.spectrum import Decomposer
from spectrim.decomposers.svd import SVD
from spectrim.errors import UserError
from spectrim.statistics.objective import Objective
from spectrim.surgery.cost import layer_parameters
from spectrim.surgery.reopening import factored_layers
from spectrim.training import svd_weights
from spectrim.training.fit import PLAIN, Callbacks, Training, fit
from spectrim.training.saved_state import StateFile


def train(
    net: nn.Module,
    objective: Objective,
    training: Training,
    callbacks: Callbacks = PLAIN,
    state: StateFile | None = None,
) -> list[dict]:
    """Train ``net`` in place on the ``train`` split of ``objective``, as ``fit`` does, and return the curve.

    Raises ``UserError`` for missing train batches, and where the loss stops being finite. ``state`` then holds the last
    good epoch.
    """
    try:
        return fit(net, objective.given("train"), training, callbacks, state)
    except FloatingPointError as error:
        kept = f"the last good epoch is in {state.path}" if state else "nothing is kept"
        raise UserError(f"{error}; {kept}") from error


def train_by_settings(
    algorithm: Any,
    net: nn.Module,
    objective: Objective,
    decomposer: SVD,
    callbacks: Callbacks,
    undecayed: Collection[str] = (),
) -> list[dict]:
    """Train ``net`` by the settings ``recipe``, ``seed`` and ``state`` of ``algorithm``, and return the curve.

    The class and the other settings of the algorithm tell its state from that of another training.
    """
    own = {key: value for key, value in asdict(algorithm).items() if key not in ("recipe", "seed", "state")}
    identity = own | {"method": type(algorithm).__name__, "view": decomposer.view}
    training = Training(algorithm.recipe, algorithm.seed, objective.loss, undecayed)
    return train(net, objective, training, callbacks, state_file(algorithm.state, objective, identity))


def state_file(path: str | None, objective: Objective, identity: Mapping[str, Any] | None = None) -> StateFile | None:
    """Return the state file at ``path``, which also keeps what is read of ``objective``; None for no path."""
    return StateFile(Path(path), identity or {}, objective.read) if path else None


def plain_svd(decomposer: Decomposer, method: str) -> SVD:
    """Return ``decomposer``. Raises ``UserError`` if it is not the plain SVD, which ``method`` needs."""
    if not isinstance(decomposer, SVD):
        given = type(decomposer).__name__
        raise UserError(f"{method} needs the plain SVD (decomposer=svd_channel or svd_spatial), not {given}")
    return decomposer


def finished(
    given: nn.Module, net: nn.Module, ranks: Mapping[str, int], curve: list[dict], decomposer: SVD, objective: Objective
) -> Compressed:
    """Return the compressed model of a training that turned ``given`` into ``net``.

    ``ranks``: the rank that each parametrised layer of ``net`` has reached. Cutting it to that rank changes its form
        only. The other layers stay dense. A layer that an earlier compression factored is cut further, if it would have
        more parameters than in ``given`` otherwise.
    """
    for name in ranks:
        svd_weights.fold(net.get_submodule(name))
    in_modes_of(given, net)
    bench = Workbench.of(net, decomposer, objective)
    again = [name for name in factored_layers(given) if name in bench.spectra]
    within = {name: max(1, bench.spectra[name].rank_within(layer_parameters(given, name))) for name in again}
    cut = {name: min(most, ranks.get(name, most)) for name, most in within.items()}
    return replace(bench.finish({**ranks, **cut}, curve), dense=given, trained=True)


def in_modes_of(given: nn.Module, net: nn.Module) -> None:
    """Put every module of ``net`` into the mode of the module of the same name in ``given``, if there is one."""
    modes = {name: module.training for name, module in given.named_modules()}
    for name, module in net.named_modules():
        module.training = modes.get(name, module.training)
