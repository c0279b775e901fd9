"""The formats that a compressed model is exported to."""

from pathlib import Path
from typing import Literal, get_args

from torch import nn

from spectrim.batches import Inputs
from spectrim.errors import MissingInput, UserError
from spectrim.export import plain, program

ExportKind = Literal["plain", "pt2", "onnx"]


def write(kind: str, path: Path, model: nn.Module, example: Inputs | None, dynamic: bool, opset: int) -> None:
    """Write ``model`` to ``path`` as ``kind``. Raises ``UserError`` as ``Compressed.export`` does."""
    if kind not in get_args(ExportKind):
        raise UserError(f"export writes one of {', '.join(get_args(ExportKind))}, not {kind!r}")
    if kind == "plain":
        plain.write(path, model, example)
    elif example is None:
        raise MissingInput(f'export("{kind}", …) traces the model; pass example=, or calibration= to compress')
    elif kind == "pt2":
        program.write_pt2(path, model, example, dynamic)
    else:
        program.write_onnx(path, model, example, dynamic, opset)
