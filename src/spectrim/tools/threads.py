"""Let another thread compute as this one does."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import copy_context

import torch

from spectrim.tools.precision import KINDS


def inheriting(function: Callable[[], None]) -> Callable[[], None]:
    """Return ``function`` to be run once in a thread that begins, with what torch and Python set by thread.

    These are the context variables, the number of threads of torch, autocast, and the card and its stream. OpenMP knows
    of no number but its own default in a new thread, and sums are rounded otherwise with another. What other code keeps
    by thread, in a ``threading.local``, cannot be taken along.
    """
    context, width = copy_context(), torch.get_num_threads()
    autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in KINDS]
    cached = torch.is_autocast_cache_enabled()
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def run() -> None:
        torch.set_num_threads(width)
        torch.set_autocast_cache_enabled(cached)
        for kind, enabled, dtype in autocast:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        on: AbstractContextManager[None] = torch.cuda.stream(stream)  # None: the default one
        with on:
            context.run(function)

    return run
