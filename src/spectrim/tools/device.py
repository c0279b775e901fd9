"""Select the device of a run: the CPU or a GPU."""

import torch

from spectrim.errors import UserError

KINDS = ("cpu", "cuda")  # Decompositions use float64, which mps lacks.


def device_called(name: object) -> torch.device:
    """Return the device named ``cpu``, ``cuda`` or ``cuda:1`` (the second GPU).

    For a GPU it also disables TF32. By default convolutions drop 13 of the 23 mantissa bits of float32 inputs, which
    changes a loss by more than a cautious selection does. It also makes cuDNN deterministic.

    Raises ``UserError`` for another name, and where torch finds no such device.
    """
    try:
        device = torch.device(name)  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in KINDS or type(name) is not str:
        raise UserError(f"device={name!r} is none; give one of {', '.join(KINDS)}, or cuda:1 for the second GPU")
    if device.type != "cpu":
        there = torch.cuda.device_count()
        if (device.index or 0) >= there:
            raise UserError(f"device={name}: torch finds {there or 'no'} such device here; use device=cpu")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
    return device
