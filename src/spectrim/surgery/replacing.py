"""From a plan to a model: layers replaced by their factors."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from spectrim.decomposers.spectrum import Spectrum
from spectrim.errors import UserError
from spectrim.factored.plan import RankPlan


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put ``layer`` at the dotted ``name``, in place, in the mode and the memory format of the one that was there."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, in_place_of(model.get_submodule(name), layer))


def in_place_of(before: nn.Module, layer: nn.Module) -> nn.Module:
    """``layer`` itself, in the mode and the memory format of ``before``."""
    layer.train(before.training)
    if isinstance(before, nn.Conv2d) and not before.weight.is_contiguous():
        layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return layer


def apply(model: nn.Module, plan: RankPlan, spectra: Mapping[str, Spectrum], *, shared: bool = False) -> nn.Module:
    """A copy of ``model`` with the layers of ``plan`` factored. Raises ``UserError`` for a layer not in ``spectra``.

    What is replaced is not copied first: memory holds the model and the copy, which may be half its size. ``shared``:
    its other parameters are those of ``model`` themselves, for a copy that only looks.
    """
    copies: dict[int, Any] = {id(own): own for own in model.parameters()} if shared else {}
    for name, kept in plan.items():
        if name not in spectra:
            raise UserError(f"the plan names {name!r}, which is not a layer of this model that can be factored")
        layer = model.get_submodule(name)
        copies[id(layer)] = in_place_of(layer, spectra[name].factor(kept.keep))
    return copy.deepcopy(model, copies)
