"""Training inside an algorithm: the caller's random numbers are left alone, a loss that breaks is said in one line."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectrim.errors import UserError
from spectrim.objective import Objective
from spectrim.training import Recipe, fit


def train(
    net: nn.Module, objective: Objective, recipe: Recipe, *, seed: int, state: str | None, **more: Any
) -> list[dict]:
    """Train ``net`` in place on the ``train`` split of ``objective``; ``more`` goes to ``fit``. Returns the curve.

    ``state``: the file from which an interrupted training goes on; None: it begins anew. Raises ``UserError`` without a
    train split and where the loss stops being finite; ``state`` then holds the last good epoch.
    """
    path = Path(state) if state else None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return fit(net, objective.given("train"), recipe, seed=seed, loss=objective.loss, state=path, **more)
        except FloatingPointError as error:
            kept = f"the last good epoch is in {path}" if path else "nothing is kept"
            raise UserError(f"{error}; {kept}") from error


def in_modes_of(given: nn.Module, net: nn.Module) -> None:
    """Put every module of ``net`` that ``given`` has too into the mode it has there."""
    modes = {name: module.training for name, module in given.named_modules()}
    for name, module in net.named_modules():
        module.training = modes.get(name, module.training)
