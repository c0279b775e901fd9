"""Makes torchvision importable beside a torch that its compiled operators were not built for.

torchvision's wheel is built against one torch; beside another (the CPU-only one, say) its operators do not load, and
its import stops where it registers a kernel for ``nms``, which nothing has declared. Models, transforms and data sets
call none of these operators, so declaring them is enough.
"""

import contextlib
import functools
import importlib.util
import sys
from pathlib import Path

import torch

from spectrim.errors import UserError

SCHEMAS = ("nms", "qnms")
# What the declarations live in: they end with this object.
_LIBRARY: list[torch.library.Library] = []


@functools.cache
def prepare() -> None:
    """Call before torchvision is imported; a second call does nothing.

    Raises ``UserError`` where torchvision is not installed.
    """
    if "torchvision" in sys.modules:
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise UserError("torchvision is not installed; install the version that belongs to the installed torch")
    if not _operators_load(Path(spec.origin).parent):
        declare()


def declare() -> None:
    """Declare the operators' signatures, without implementations."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in SCHEMAS:
        with contextlib.suppress(RuntimeError):  # declared already, by somebody else who mends the same
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARY.append(library)


def _operators_load(folder: Path) -> bool:
    """Whether torchvision's compiled operators, if there are any, fit the installed torch."""
    for path in (*folder.glob("_C*.so"), *folder.glob("_C*.pyd")):
        try:
            torch.ops.load_library(path)
        except OSError:
            continue
        return True
    return False
