"""Tell whether a model computes the same with modules of another class in place of its layers, and on a copy.

A model may ask for the class of a layer, and a function or hook that it holds may hold the model itself. A model with
factored layers would then compute something else without a word.
"""

import operator
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from threading import Thread
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.batches import Inputs, device_of, evaluating, forward, to_device
from spectrim.errors import UserError
from spectrim.factored.dense import attributes_of
from spectrim.surgery.comparable import comparable
from spectrim.surgery.given_model import unchanged
from spectrim.surgery.replacing import by_id, copied_with
from spectrim.surgery.tied import tied_layers
from spectrim.tools.hooks import hooked
from spectrim.tools.threads import inheriting

TOLERANCE = 1e-3  # of the norm of an output; a processor may add up in another order at each pass
MISLED = "the model computes something else with a layer of another class in its place"
UNSTEADY = (
    "the model gives other outputs at a second pass over the same inputs, as where it draws random numbers in eval mode"
)
BY_THREAD = "the model gives other outputs in another thread, as where it reads what is kept by thread"


class _StandIn(nn.Module):
    """A module that computes with the dense layer in whose place it is, which is no part of it."""

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        vars(self)["dense"] = dense

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return vars(self)["dense"].forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["dense"], name)


def misled_and_steady(
    model: nn.Module, given: nn.Module, layers: Collection[str], example: Inputs
) -> tuple[dict[str, str], bool]:
    """Return the ``misled`` ones of ``layers`` with the reason, and whether the model ``is_steady``.

    Two passes tell both for most models. The one with a stand-in for each layer repeats the outputs of the dense model,
    with other random numbers of torch.

    ``given``: the model that the user gave, of which ``model`` may be a copy.

    Raises ``UserError`` where a copy of the model still calls a module of ``given``, or misses what it writes there.
    """
    dense, own = _outputs(model, example), with_stand_ins(model, layers)
    with _apart(own, (model, given)) as written:
        outputs = _outputs(own, example, seed=1)
    _refuse_stale(own, written, outputs, example)
    if _alike(outputs, dense):
        return {}, True
    return misled(model, layers, example), is_steady(model, example)


def misled(model: nn.Module, layers: Collection[str], example: Inputs) -> dict[str, str]:
    """Return those of ``layers`` whose class decides on the outputs of ``model``, with the reason.

    The model runs on ``example`` with a stand-in for each layer, and its outputs are compared with those of the dense
    model. Where they differ it runs with each stand-in alone. A model that differs from itself, as one does that draws
    numbers of a generator of its own, cannot be told.
    """
    left, dense = list(layers), _outputs(model, example)
    found: dict[str, str] = {}
    while left:
        outputs = _outputs(with_stand_ins(model, left), example)
        if _alike(outputs, dense) or not _alike(_outputs(model, example), dense):
            return found
        alone = [name for name in left if not _alike(_outputs(with_stand_ins(model, [name]), example), dense)]
        found |= dict.fromkeys(alone or left, MISLED)
        left = [name for name in left if name not in found]
    return found


def with_stand_ins(model: nn.Module, layers: Collection[str]) -> nn.Module:
    """Return a copy of ``model`` with a stand-in for each of ``layers`` and those that share its weight.

    It shares the parameters of ``model``.
    """
    ties = tied_layers(model)
    places = [model.get_submodule(place) for name in layers for place in (name, *ties.get(name, ()))]
    return copied_with(model, [(dense, _StandIn(dense)) for dense in places], by_id(model.parameters()))


def is_steady(model: nn.Module, example: Inputs) -> bool:
    """Return whether two passes over ``example`` give the same outputs, with other random numbers of torch in each."""
    return _alike(_outputs(model, example, seed=1), _outputs(model, example))


def not_repeated(model: nn.Module, example: Inputs) -> str:
    """Return why a thread that begins gives other outputs for ``example`` than this one; empty where it does not."""
    theirs: list[Tensor] = []

    def run() -> None:
        with suppress(Exception):  # whatever a model raises that misses what this thread has
            theirs.extend(_outputs(model, example, seed=1))

    thread = Thread(target=inheriting(run))
    thread.start()
    thread.join()
    ours = _outputs(model, example)
    if _alike(ours, theirs):
        return ""
    return BY_THREAD if _alike(ours, _outputs(model, example, seed=1)) else UNSTEADY


def _outputs(model: nn.Module, example: Inputs, seed: int = 0) -> list[Tensor]:
    """Return the tensors among the outputs, with the random numbers of a fixed seed."""
    device = device_of(model)
    cards = [device] if device.type == "cuda" else []
    with unchanged(model), evaluating(model), torch.no_grad(), torch.random.fork_rng(cards):
        torch.manual_seed(seed)
        return [output.clone() for output in comparable(forward(model, to_device(example, device)))]


def _alike(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(_is_near, ours, theirs))


def _is_near(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.layout is not torch.strided:
        return one.shape == other.shape
    if torch.equal(one, other):
        return True
    one, other = one.nan_to_num().double(), other.nan_to_num().double()
    return bool((one - other).norm() <= TOLERANCE * other.norm())


@contextmanager
def _apart(own: nn.Module, others: Collection[nn.Module]) -> Iterator[list[tuple[str, str]]]:
    """Raise ``UserError`` where the block, which only runs ``own``, calls a module of ``others``.

    Yield a list. After the block it has the names of the modules of ``others``, and of their attributes, that the block
    has written to.
    """
    inside, written = set(own.modules()), list[tuple[str, str]]()
    names = {module: name for other in others for name, module in other.named_modules() if module not in inside}

    def refuse(module: nn.Module, *_: Any) -> None:
        raise UserError(
            f"a copy of the model still calls {names[module] or type(module).__name__!r} of the given one: a function, "
            "hook or weak reference in the model holds that module; let it take the module from its arguments"
        )

    plain = [module for module in names if not isinstance(module, torch.jit.ScriptModule)]
    before = [_attributes(module) for module in plain]
    with hooked(before=[(module, refuse) for module in plain]):
        yield written
    for module, attributes in zip(plain, before, strict=True):
        now = _attributes(module)
        written += [(names[module], name) for name in now if not _are_same(now[name], attributes.get(name))]


def _refuse_stale(own: nn.Module, written: Collection[tuple[str, str]], outputs: list[Tensor], example: Inputs) -> None:
    """Raise ``UserError`` where ``own`` computes with an attribute that it has ``written`` to another model alone.

    It would compute with what an earlier pass has left there. Without that it then fails, or gives other ``outputs``.
    """
    for place, name in dict.fromkeys(written):
        attributes = vars(own.get_submodule(place))
        before = dict(attributes)
        kept = attributes.get(name)
        attributes[name] = type(kept)() if isinstance(kept, dict | list | set | deque) else None
        try:
            reads = not _alike(_outputs(own, example, seed=1), outputs)
        except Exception:  # whatever a model raises that misses it
            reads = True
        attributes.clear()
        attributes.update(before)
        if reads:
            raise UserError(
                f"a copy of the model still writes to {'.'.join(filter(None, (place, name)))!r} of the given one: a "
                "function or hook in it holds it, and a copy would read what an earlier pass left; let the function "
                "take it from its arguments"
            )


def _attributes(module: nn.Module) -> dict[str, list[Any]]:
    """Return what each attribute of ``module`` is, and what it holds where it is a container."""
    return {name: [value, *_items(value)] for name, value in attributes_of(module).items()}


def _items(value: Any) -> list[Any]:
    return list(value.values() if isinstance(value, dict) else value if isinstance(value, list | set | deque) else ())


def _are_same(one: list[Any], other: list[Any] | None) -> bool:
    return other is not None and len(one) == len(other) and all(map(operator.is_, one, other))
