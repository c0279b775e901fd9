"""Refuse a loss that reads layers of the given model: it would judge that model, whatever is cut."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import nn

from spectrim.batches import cloned, device_of, evaluating, forward, to_device
from spectrim.errors import UserError
from spectrim.losses import Loss, loss_of
from spectrim.statistics.objective import Objective
from spectrim.surgery.given_model import unchanged
from spectrim.tools.hooks import hooked
from spectrim.tools.trainable import alone_trainable

KNOWN = "torch.nn.functional", "torch.nn.modules.loss", "spectrim."  # modules whose losses hold no model


def require_apart(model: nn.Module, layers: Iterable[str], objective: Objective) -> None:
    """Raise ``UserError`` where the loss calls one of ``layers`` of ``model``, or depends on their weights.

    Such a loss measures the residual of an equation by a pass of its own, for example, or the norm of all weights. It
    holds the model that the user gave, whose layers stay dense. It may read all that no cut changes, such as a learned
    temperature, or a head that the model itself does not call.

    The model runs once on the first calibration batch. The loss is evaluated once, on outputs without a history. A loss
    of torch or of spectrim is not, and one that fails there is not refused here.

    ``layers``: those that can be replaced, by the names that they have in ``model`` or in an unpacked copy.
    """
    if "calibration" not in objective.splits or _is_known(objective.loss):
        return
    modules = dict(model.named_modules())
    places = {_place(modules, name): name for name in layers}
    weights = {own: name for place, name in places.items() for own in place.parameters() if own.is_floating_point()}
    device, read = device_of(model), list[str]()
    with ExitStack() as stack:
        for module in (model, getattr(objective.loss, "__self__", objective.loss)):
            if isinstance(module, nn.Module):  # a loss may count its calls, too
                stack.enter_context(unchanged(module))
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(evaluating(model))
        inputs, targets = to_device(next(iter(objective.batches("calibration"))), device)
        with torch.no_grad():
            outputs = forward(model, inputs)

        def noted(module: nn.Module, *_: Any) -> None:
            read.append(places[module])

        stack.enter_context(hooked(before=[(place, noted) for place in places]))
        stack.enter_context(alone_trainable(model, weights))
        with suppress(Exception), torch.enable_grad():
            value = loss_of(objective.loss, cloned(outputs), targets)
            if value.requires_grad:
                found = torch.autograd.grad(value, list(weights), allow_unused=True)
                read += [name for name, own in zip(weights.values(), found, strict=True) if own is not None]
    if read:
        raise UserError(
            f"the loss reads {read[0]} of the given model, which stays dense, so that no cut would change it; let it "
            "take the outputs and the targets alone, or give copy.deepcopy(model) to a loss that needs a dense teacher"
        )


def _is_known(loss: Loss) -> bool:
    return str(getattr(loss, "__module__", "")).startswith(KNOWN)


def _place(modules: Mapping[str, nn.Module], name: str) -> nn.Module:
    """Return the module called ``name``, or the innermost one around it where the model is not unpacked."""
    while name not in modules:
        name = name.rpartition(".")[0]
    return modules[name]
