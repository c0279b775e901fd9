"""Tell which layers a refit can fit, from the passes of its batches through the compressed model."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.batches import Inputs, evaluating, first_argument, forward, of_one_sample, tensors_of, with_tensors
from spectrim.errors import UserError
from spectrim.factored.layers import FactoredConv2d, FactoredLinear, TuckerConv2d
from spectrim.factored.tied import TiedLinear
from spectrim.statistics.batchnorm import norms_of
from spectrim.statistics.processes import ALONE, Processes
from spectrim.tools.hooks import hooked
from spectrim.tools.sparse import rows_at

OF_VALUES = "its rows depend on the values of the batch"


def layers_to_fit(
    model: nn.Module, dense: nn.Module, batches: Sequence[Inputs], processes: Processes = ALONE
) -> tuple[list[str], dict[str, str], list[str]]:
    """Return the layers to fit in the order of their calls, the BatchNorm that each feeds, and notes on the others.

    A layer is fitted where every batch calls it once, on rows that do not depend on the values of the batch. Those of
    an expert do: the compressed model and the dense one send it different tokens.
    """
    kinds = FactoredLinear, FactoredConv2d, TuckerConv2d
    before = {name for name, module in dense.named_modules() if isinstance(module, kinds)}  # by an earlier compression
    layers = {name: own for name, own in model.named_modules() if isinstance(own, kinds) and name not in before}
    passes = [_pass(model, layers, inputs) for inputs in batches]
    first, alike = passes[0], _pass_of_equal_rows(model, layers, batches[0])
    peers = [own for own, inputs in zip(passes, batches, strict=True) if _shapes(inputs) == _shapes(batches[0])]
    unfit: dict[str, str] = {}
    for name in layers:
        if any(one.calls[name] != 1 for one in passes):
            unfit[name] = "it is not called once on every batch"
        elif any(first.shapes[name] != own.shapes.get(name) for own in (*peers, alike) if own is not None):
            unfit[name] = OF_VALUES
    for name in processes.in_any(unfit, layers):
        unfit.setdefault(name, "another process does not fit it")
    shared = {norm for one in passes for norm in norms_of(model) if one.calls[norm] > 1}
    return (
        [name for name in first.shapes if name not in unfit],
        {name: norm for one in passes for name, norm in one.followers.items() if norm not in shared},
        [f"{name}: not refitted: {why}" for name, why in {**unfit, **_tied(model)}.items()],
    )


def _tied(model: nn.Module) -> dict[str, str]:
    """Return why layers that share the factors of an embedding are not fitted: a better head would spoil its rows."""
    heads = [name for name, module in model.named_modules() if isinstance(module, TiedLinear)]
    return dict.fromkeys(heads, "its factors are also those of an embedding")


@dataclass
class _Pass:
    """What one forward pass shows: the shape that each layer puts out, in the order of the calls; the BatchNorm that
    each layer feeds; and how often each layer and each BatchNorm is called."""

    shapes: dict[str, torch.Size] = field(default_factory=dict)
    followers: dict[str, str] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)


def _pass(model: nn.Module, layers: Mapping[str, nn.Module], inputs: Inputs) -> _Pass:
    seen, outputs = _Pass(), dict[str, tuple[Tensor, int | None]]()

    def called(name: str, _: nn.Module, __: tuple, ___: dict[str, Any], output: Tensor) -> None:
        outputs.setdefault(name, (output, _version(output)))
        seen.shapes.setdefault(name, output.shape)
        seen.calls[name] += 1

    def fed(norm: str, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = first_argument(args, kwargs)
        # An activation in place, or a hook, may have changed what the layer put out.
        unchanged = [name for name, (output, version) in outputs.items() if x is output and _version(x) == version]
        seen.followers.update(dict.fromkeys(unchanged, norm))
        seen.calls[norm] += 1

    after = [(layer, partial(called, name)) for name, layer in layers.items()]
    before = [(norm, partial(fed, name)) for name, norm in norms_of(model).items()]
    with hooked(before=before, after=after), evaluating(model), torch.no_grad():
        forward(model, inputs)
    return seen


def _version(tensor: Tensor) -> int | None:
    """Return a count of the changes of ``tensor``; None where it has none."""
    return None if tensor.is_inference() else tensor._version


def _shapes(inputs: Inputs) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors_of(inputs)]


def _pass_of_equal_rows(model: nn.Module, layers: Mapping[str, nn.Module], inputs: Inputs) -> _Pass | None:
    """Return a pass on inputs of the same shapes in which all rows, or all samples, are equal; None if both fail."""
    for alike in (_of_one_row, of_one_sample):
        with suppress(UserError):
            return _pass(model, layers, alike(inputs))
    return None


def _of_one_row(inputs: Inputs) -> Inputs:
    """Return inputs of the same shapes in which all rows, and all ids, are the first one."""
    return with_tensors(inputs, _first_row)


def _first_row(tensor: Tensor) -> Tensor:
    if not tensor.numel() or not tensor.ndim:
        return tensor
    if tensor.layout is not torch.strided:
        return rows_at(tensor, torch.zeros(len(tensor), dtype=torch.int64, device=tensor.device))
    vectors = tensor.is_floating_point() and tensor.ndim > 1
    return (tensor.flatten(0, -2) if vectors else tensor.flatten())[:1].expand(tensor.shape)
