"""Make torchvision importable with a torch that its compiled operators were not built for.

The torchvision wheel is built against one torch. With another torch, such as the CPU-only one, its operators do not
load. The import then fails when it registers a kernel for the undeclared operator ``nms``. Models, transforms and data
sets call none of these operators, so it is enough to declare them.
"""

import contextlib
import functools
import importlib.util
import sys
from pathlib import Path

import torch

from spectrim.errors import UserError

SCHEMAS = ("nms", "qnms")
# The declarations exist only as long as these objects.
_LIBRARY: list[torch.library.Library] = []


@functools.cache
def prepare() -> None:
    """Prepare the import of torchvision. Call it before that import; a second call does nothing.

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
        with contextlib.suppress(RuntimeError):  # Another package with the same workaround may have declared it.
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _LIBRARY.append(library)


def _operators_load(folder: Path) -> bool:
    """Return whether torchvision has compiled operators that load with the installed torch."""
    for path in (*folder.glob("_C*.so"), *folder.glob("_C*.pyd")):
        try:
            torch.ops.load_library(path)
        except OSError:
            continue
        return True
    return False
