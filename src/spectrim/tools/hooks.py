"""Watch the calls of modules while a block runs. Hooks are registered nowhere else."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from spectrim.tools.precision import exact

Hooks = Iterable[tuple[nn.Module, Callable[..., Any]]]


@contextmanager
def hooked(*, before: Hooks = (), after: Hooks = ()) -> Iterator[None]:
    """Call hooks of modules inside the block, at calls of this thread alone: another may serve the model meanwhile.

    They compute without the autocast that a model enters (``precision.exact``).

    ``before``: modules, each with a ``hook(module, args, kwargs)`` that is called before its forward pass.
    ``after``: modules, each with a ``hook(module, args, kwargs, output)`` that is called after its forward pass, before
        the hooks that the module has, which may change the output. What it returns takes the place of the output,
        unless it is None.
    """
    handles: list[RemovableHandle] = []
    try:
        for module, hook in before:
            handles.append(module.register_forward_pre_hook(_of_this_thread(hook), with_kwargs=True))
        for module, hook in after:
            handles.append(module.register_forward_hook(_of_this_thread(hook), prepend=True, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _of_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook that is called in this thread, and where a backward pass repeats a checkpointed part."""
    here = get_ident()

    def called(*args: Any) -> Any:
        # On a card torch repeats the part in a thread of its own. It must compute there as it did here.
        if get_ident() != here and torch._C._current_graph_task_id() == -1:
            return None
        with exact():
            if torch.is_inference_mode_enabled():  # what a hook keeps is changed outside of it
                with torch.inference_mode(False), torch.no_grad():
                    return hook(*args)
            return hook(*args)

    return called
