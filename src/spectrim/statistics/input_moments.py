"""Second moments of the inputs of layers, from one forward pass."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.batches import device_of, evaluating, first_argument, forward, to_device
from spectrim.decomposers.spectrum import HEAD
from spectrim.factored.dense import DenseLayer
from spectrim.factored.layers import FactoredConv2d
from spectrim.statistics import packed
from spectrim.statistics.objective import Objective
from spectrim.statistics.packed import Moment, PackedMoments
from spectrim.statistics.padding import NO_PADDING, padding_of
from spectrim.statistics.processes import Processes
from spectrim.statistics.shifted_moments import is_wide, padded, patch_moment
from spectrim.surgery.tied import tied_layers
from spectrim.tools.hooks import hooked
from spectrim.tools.precision import wide


def input_moments(
    model: nn.Module,
    views: Mapping[str, Sequence[str]],
    objective: Objective,
    samples: int,
) -> dict[str, PackedMoments]:
    """Return ``E[x x^T]`` over samples and positions: layer → view → float64 (g, I, I) on the layer's device.

    An embedding has the diagonal only, of shape (g, I): the frequency of each id (``_Counted``). Positions that
    ``attention_mask`` or ``decoder_attention_mask`` marks as padding do not count (``padding``). Embeddings that share
    a weight count together. If linear layers share it, too, the second moment of their inputs comes beside the
    frequencies, as ``HEAD``. Linear layers that read the same tensors hold one moment together.

    ``views``: layer → the views of its weight. A view determines what one input x is. It is a vector of a Linear. In
    the channel view of a convolution it is a patch of I/g * kh * kw numbers, in the spatial view a row of I/g * kw.
    ``samples``: number of calibration samples to read, in whole batches.
    Raises ``UserError`` for an empty calibration split.
    """
    layers = {name: model.get_submodule(name) for name in views}
    last = _Last()
    gathered = {name: {view: _gatherer(layers[name], view, last) for view in own} for name, own in views.items()}
    places = [(layers[name], one) for name, own in gathered.items() for one in own.values()]
    for name, others in tied_layers(model).items():
        if own := gathered.get(name):
            tied = [model.get_submodule(other) for other in others]
            places += [(other, one) for other in tied if isinstance(other, nn.Embedding) for one in own.values()]
            heads = [other for other in tied if isinstance(other, nn.Linear)]
            places += [(head, own.setdefault(HEAD, _Gathered(head, "linear", last))) for head in heads]
    hooks = [one for own in gathered.values() for one in own.values()]
    device = device_of(model)
    with evaluating(model), torch.no_grad():  # in inference mode tensors have no version
        for inputs, _ in objective.first("calibration", samples, "moments"):
            inputs = to_device(inputs, device)
            padding = padding_of(model, [layer for layer, _ in places], inputs)
            for one in hooks:
                one.padding = padding
            with hooked(before=places):
                forward(model, inputs)
            last.forget()
    processes = objective.processes("calibration")
    return {
        name: PackedMoments({view: one.mean(processes) for view, one in own.items()}) for name, own in gathered.items()
    }


Positions = tuple[Tensor, ...]  # in the output of a convolution: indices of sample, row and column


class Rows:
    """Reshapes inputs and outputs of a layer to rows, (g, rows, I) and (g, rows, O), one row per position.

    The input rows of a convolution are the patches that the first factor in the given view sees.
    """

    def __init__(self, layer: nn.Module, view: str) -> None:
        self.first: nn.Conv2d | None = None
        dense = DenseLayer.of(layer).without_weights()
        self.groups = dense.groups
        columns = dense.sides(view)[1]
        self.moment = dense.groups, columns, columns  # the shape of a second moment of inputs
        if isinstance(dense.module, nn.Conv2d):
            _, size = dense.sides(view)
            self.first = FactoredConv2d.shaped_like(dense.module, size, view).first

    def inputs(self, x: Tensor, mask: Tensor | None = None, at: Positions | None = None) -> Tensor:
        """Return the rows of inputs ``x``.

        ``mask``: 0 at the padding of a Linear's inputs, which is left out.
        ``at``: the only positions to return, for a convolution.
        """
        if self.first is None:
            return self.outputs(x, mask)
        patches = _patches(self.first, x)
        if at is not None:
            return self._grouped(patches.permute(0, 2, 3, 1, 4, 5)[at])
        rows = patches.permute(1, 4, 5, 0, 2, 3).flatten(3).flatten(0, 2)  # a single copy, in the order of the weight
        return rows.unflatten(0, (self.groups, -1)).mT

    def outputs(self, y: Tensor, mask: Tensor | None = None, at: Positions | None = None) -> Tensor:
        """Return the rows of outputs ``y``; ``mask`` and ``at`` as for inputs."""
        if at is not None:
            return self._grouped(y.permute(0, 2, 3, 1)[at])
        if self.first is not None:
            return y.transpose(0, 1).reshape(self.groups, y.shape[1] // self.groups, -1).transpose(1, 2)
        if mask is not None and mask.shape == y.shape[:-1]:
            y = y[mask.bool()]
        return y.reshape(1, -1, y.shape[-1])

    def _grouped(self, rows: Tensor) -> Tensor:
        return rows.reshape(len(rows), self.groups, -1).transpose(0, 1)


def _patches(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Return the patch that the kernel of ``layer`` sees at each position: a view (N, C, rows, columns, kh, kw)."""
    x = padded(layer, x)
    for axis, size, stride, dilation in zip((2, 3), layer.kernel_size, layer.stride, layer.dilation, strict=True):
        x = x.unfold(axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    return x


def _gatherer(layer: nn.Module, view: str, last: "_Last") -> "_Gathered | _Counted":
    return _Counted(layer.num_embeddings) if isinstance(layer, nn.Embedding) else _Gathered(layer, view, last)


@dataclass(eq=False)
class _Sum:
    """The sum of ``x x^T`` over ``count`` inputs. Layers hold one together for as long as they read the same tensors.

    It is not changed, but for ``mean``, when all inputs are in.
    """

    count: int
    value: Tensor
    is_mean: bool = False

    def mean(self, count: int) -> Tensor:
        """Divide the sum by ``count``, once for all layers that hold it."""
        if not self.is_mean:
            self.value.div_(max(count, 1))
            self.is_mean = True
        return self.value


class _Last:
    """The last tensor that a linear layer read, and the sums to which its moment was added."""

    def __init__(self) -> None:
        self.nothing = _Sum(0, torch.zeros(0))
        self.read: Tensor | None = None
        self.seen: tuple[Any, ...] = ()
        self.after: dict[_Sum, _Sum] = {}

    def forget(self) -> None:
        """Let go of the tensor."""
        self.read, self.seen = None, ()
        self.after.clear()

    def added(self, x: Tensor, before: "_Sum", add: Callable[[], "_Sum"]) -> "_Sum":
        """Return ``add()``, or what it returned for the same tensor, unchanged since, and the same sum ``before``."""
        if x.is_inference():  # it has no version that would tell of a change
            return add()
        seen = x.untyped_storage().data_ptr(), x.storage_offset(), x.shape, x.stride(), x.dtype, x._version
        if self.read is None or self.seen != seen:  # a tensor that is held cannot lose its place to another one
            self.forget()
            self.read, self.seen = x, seen
        if before not in self.after:
            self.after[before] = add()
        return self.after[before]


class _Gathered:
    """A hook that sums ``x x^T`` over the inputs of one layer."""

    def __init__(self, layer: nn.Module, view: str, last: _Last) -> None:
        self.rows, self.last = Rows(layer, view), last
        self.sum = last.nothing
        self.wide = self.rows.first if is_wide(layer) else None
        self.padding = NO_PADDING

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = first_argument(args, kwargs).detach()
        if self.rows.first is None:
            mask = self.padding.at_next_call(layer, x.shape[:-1])
            self.sum = self.last.added(x, self.sum, lambda: self._with(x, mask))
        else:
            self.sum = self._with(x)

    def _with(self, x: Tensor, mask: Tensor | None = None) -> _Sum:
        """Return the sum with the inputs ``x``."""
        if self.wide is not None:
            count, added = patch_moment(self.wide, padded(self.wide, x))
        else:
            x = wide(self.rows.inputs(x, mask))
            count, added = x.shape[1], x.transpose(1, 2) @ x
        value = packed.held(added).double()
        return _Sum(self.sum.count + count, self.sum.value + value if self.sum.count else value)

    def mean(self, processes: Processes) -> Moment:
        """Return the mean of ``x x^T`` over the inputs that all processes saw."""
        if processes.size == 1:
            return packed.moment_of(self.sum.mean(self.sum.count), self.rows.moment[-1])
        count = int(processes.add_up(torch.tensor(self.sum.count)))
        value = self.sum.value
        if count and not self.sum.count:  # only others came by this layer
            value = packed.held(torch.zeros(self.rows.moment, dtype=torch.float64))
        mean = (processes.add_up(value) if count else value) / max(count, 1)
        return packed.moment_of(mean, self.rows.moment[-1])


class _Counted:
    """A hook that counts how often each of ``size`` ids is looked up in an embedding."""

    def __init__(self, size: int) -> None:
        self.counts = torch.zeros(size, dtype=torch.int64)
        self.padding = NO_PADDING

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = first_argument(args, kwargs)
        if (mask := self.padding.at_next_call(layer, ids.shape)) is not None:
            ids = ids[mask.bool()]
        self.counts = self.counts.to(ids.device) + torch.bincount(ids.flatten(), minlength=len(self.counts))

    def mean(self, processes: Processes) -> Tensor:
        """Return the estimated frequency of each id, of shape (1, size), also of ids that no process saw.

        The unseen ids together are as frequent as the ids that were seen once (Good 1953). This share is spread evenly
        over all ids, because nothing tells which of them will come.
        """
        counts = processes.add_up(self.counts)
        total, size = max(int(counts.sum()), 1), len(counts)
        new = int((counts == 1).sum()) / total
        return ((1 - new) * counts.double() / total + new / size).unsqueeze(0)
