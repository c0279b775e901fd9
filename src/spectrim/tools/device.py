"""Where a run computes: on the processor, or on a GPU."""

import torch

from spectrim.errors import UserError

KINDS = ("cpu", "cuda")  # decompositions are in float64, which mps has not


def device_called(name: object) -> torch.device:
    """The device of that name: ``cpu``, ``cuda`` or ``cuda:1`` (the second GPU).

    On a GPU float32 is then computed as float32: by default its convolutions drop 13 of 23 bits of the inputs, which
    moves a loss by more than a cautious selection does. They are also made to give the same twice, as far as they can.

    Raises ``UserError`` for another name, and where torch finds no such device here.
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
