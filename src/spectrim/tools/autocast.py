"""What autocast and other settings of torch do to numbers, and copies of weights that autocast keeps."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

KINDS = ("cpu", "cuda")


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
    found = [f"autocast {kind} {torch.get_autocast_dtype(kind)}" for kind in KINDS if torch.is_autocast_enabled(kind)]
    if (dtype := torch.get_default_dtype()) != torch.float32:
        found.append(f"default {dtype}")
    # torch.get_float32_matmul_precision raises an error where these were set one by one.
    backends: Any = torch.backends
    operations = {"cuda products": backends.cuda.matmul, "cpu products": backends.mkldnn.matmul}
    precisions = {name: own.fp32_precision for name, own in operations.items()}
    return found + [f"{name} {own}" for name, own in precisions.items() if own not in ("none", "ieee")]
