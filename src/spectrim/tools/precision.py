"""In which precision numbers are computed: what a model and its caller choose, and what our own sums need.

A sum of products loses digits in 16 bits, and overflows float16. Our own sums are of ``wide`` numbers and are taken
without autocast (``exact``). That of the caller holds for the model and the loss, that of a model for its own numbers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

KINDS = ("cpu", "cuda")
HALVES = torch.float16, torch.bfloat16

_GIVEN: ContextVar[tuple[str, ...]] = ContextVar(
    "given", default=()
)  # kinds of devices under autocast around ``exact``


def wide(x: Tensor) -> Tensor:
    """Return ``x`` in the precision of our own products: in float32, or in float64 where it has that.

    It is float64, too, where the caller lets torch round what is multiplied, as in TF32.
    """
    least = torch.float64 if _product_precision(x.device.type) else torch.float32
    return x.to(torch.promote_types(x.dtype, least))


@contextmanager
def exact() -> Iterator[None]:
    """Compute without autocast inside the block. ``as_given`` takes back what was there before it."""
    entered = _entered()
    token = _GIVEN.set(entered)
    _switch(entered, False)
    try:
        yield
    finally:
        _switch(entered, True)
        _GIVEN.reset(token)


@contextmanager
def as_given() -> Iterator[None]:
    """Compute under the autocast that was entered around the block of ``exact`` that this one is in."""
    left = [kind for kind in _GIVEN.get() if not torch.is_autocast_enabled(kind)]
    _switch(left, True)
    try:
        yield
    finally:
        _switch(left, False)


def _entered() -> tuple[str, ...]:
    return tuple(kind for kind in KINDS if torch.is_autocast_enabled(kind))


def _switch(kinds: Sequence[str], enabled: bool) -> None:
    for kind in kinds:
        torch.set_autocast_enabled(kind, enabled)


@contextmanager
def uncached() -> Iterator[None]:
    """Let the autocast that the caller has entered convert a weight each time inside the block.

    The copy that it keeps otherwise is that of a weight that has changed since, or one without a gradient history.
    """
    cached = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def settings_of_numbers() -> list[str]:
    """Return the settings of this thread that change numbers by more than rounding, where they are not the usual."""
    with as_given():
        found = [f"autocast {kind} {torch.get_autocast_dtype(kind)}" for kind in _entered()]
    if (dtype := torch.get_default_dtype()) != torch.float32:
        found.append(f"default {dtype}")
    precisions = {kind: _product_precision(kind) for kind in reversed(KINDS)}
    return found + [f"{kind} products {own}" for kind, own in precisions.items() if own]


def _product_precision(kind: str) -> str:
    """Return the precision in which torch multiplies numbers of float32; empty where it is float32."""
    # torch.get_float32_matmul_precision raises an error where these were set one by one.
    backends: Any = torch.backends
    found = (backends.mkldnn if kind == "cpu" else backends.cuda).matmul.fp32_precision
    return "" if found in ("none", "ieee") else found
