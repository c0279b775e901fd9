"""What two passes of a model can be compared by, whatever the class of its outputs."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spectrim.batches import tensors_of


def comparable(outputs: Any) -> list[Tensor]:
    """Return every tensor in ``outputs``. Where none is found, look into objects, arrays and numbers as well.

    So a distribution of torch is told by its parameters, and a result of a class of the user by its attributes. A
    complex tensor is told by its real and imaginary parts.
    """
    found = tensors_of(outputs) or _inside(outputs, set())
    return [torch.view_as_real(own.resolve_conj()) if own.is_complex() else own for own in found]


def _inside(value: Any, seen: set[int]) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, int | float | complex | np.ndarray | np.generic):
        plain = np.asarray(value)
        return [torch.as_tensor(plain)] if plain.dtype.kind in "biufc" else []
    if isinstance(value, nn.Module | type | str | bytes) or id(value) in seen:
        return []
    seen.add(id(value))
    return [tensor for part in _parts(value) for tensor in _inside(part, seen)]


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    slots = [slot for kind in type(value).__mro__ for slot in getattr(kind, "__slots__", ()) if hasattr(value, slot)]
    return [*getattr(value, "__dict__", {}).values(), *(getattr(value, slot) for slot in slots)]
