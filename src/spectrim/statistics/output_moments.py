"""Second moments of gradients at the outputs of layers, from backward passes along random directions of the scores.

Let x_p be the input of a layer and g_p the gradient at its output, at position p. The Fisher information of its weight
W is the second moment of ``sum_p g_p x_p^T``. With positions taken as independent, and g as independent of x, it is the
Kronecker product of ``G = sum_p E[g_p g_p^T]`` and ``C = E[x x^T]`` (K-FAC: Martens and Grosse, arXiv 1503.05671; for
convolutions: Grosse and Martens, arXiv 1602.01407). A change D of the weight then changes the loss by ``||G^(1/2) D
C^(1/2)||^2 / 2``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.batches import device_of, evaluating, first_argument, forward, to_device
from spectrim.decomposers.spectrum import Directions
from spectrim.factored.dense import DenseLayer
from spectrim.statistics import packed
from spectrim.statistics.backward import Leaves, detached, start_at
from spectrim.statistics.batch_loss import batch_weight, finite_loss, has_gradient
from spectrim.statistics.directions import generator_of, random_direction
from spectrim.statistics.input_moments import Rows
from spectrim.statistics.objective import NoGradient, Objective
from spectrim.statistics.packed import Moment, PackedMoments
from spectrim.statistics.processes import Processes
from spectrim.surgery.tied import tied_layers
from spectrim.tools.hooks import hooked
from spectrim.tools.precision import wide
from spectrim.tools.trainable import alone_trainable


def output_moments(
    model: nn.Module,
    views: Mapping[str, Sequence[str]],
    objective: Objective,
    samples: int,
    directions: Directions,
) -> dict[str, PackedMoments]:
    """Return G, the second moment of the gradient at the outputs: layer → view → float64 (g, O, O) on its device.

    It is summed over positions, and the mean over predictions: samples, or the predicted tokens of a language model.
    A layer that the loss does not depend on has a zero moment. Embeddings that share a weight count together.

    ``views``: layer → the views of its weight. In the spatial view of a convolution O counts output channels times kh.
        Then g is what comes back to the outputs of a 1 x kw convolution of full rank.
    ``samples``: number of calibration samples to read, in whole batches.
    ``directions``: what is differentiated.
    Raises ``UserError`` for an empty calibration split or a loss that is not finite, ``NoGradient`` for one without a
    gradient.
    """
    if not directions.labels:
        objective, generator = generator_of(model, objective, samples, directions.seed, directions.top)
        drawn = generator, directions.top
    layers = {name: model.get_submodule(name) for name in views}
    gathered = {name: {view: _Gathered(layers[name], view) for view in own} for name, own in views.items()}
    leaves = Leaves()
    ties = tied_layers(model)
    hooks = [
        (place, _catching(list(own.values()), leaves))
        for name, own in gathered.items()
        for place in (layers[name], *_embeddings(model, ties.get(name, ())))
    ]
    processes, device, count, differentiable = objective.processes("calibration"), device_of(model), 0, False
    with hooked(after=hooks), evaluating(model), torch.enable_grad(), alone_trainable(model, ()):
        for inputs, targets in objective.first("calibration", samples, "moments"):
            outputs, targets = forward(model, detached(to_device(inputs, device))), to_device(targets, device)
            loss = finite_loss(objective.loss, outputs, targets, "calibration")
            along = None if directions.labels else random_direction(objective.loss, outputs, targets, *drawn)
            if along is None:
                weight = batch_weight(objective.loss, targets, inputs)
                starts = start_at(loss * weight)
                differentiable = differentiable or bool(starts) or has_gradient(objective.loss, outputs, targets)
            else:
                starts, weight, differentiable = start_at(along.values, along.gradient), along.predictions, True
            del outputs, loss, along  # the logits, which need not stay in memory on the way back
            leaves.flow_back(starts)  # the hooks receive what flows
            leaves.forget()
            starts.clear()
            count += weight
    count, differing = processes.add_up(torch.tensor([count, int(differentiable)])).tolist()
    if not differing:
        raise NoGradient
    return {
        name: PackedMoments({view: one.mean(processes, count) for view, one in own.items()})
        for name, own in gathered.items()
    }


def _embeddings(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    modules = [model.get_submodule(name) for name in names]
    return [module for module in modules if isinstance(module, nn.Embedding)]


def _catching(gathered: Sequence["_Gathered"], leaves: Leaves) -> Callable[..., Tensor]:
    """Return a forward hook that has each of ``gathered`` receive the gradient at the output of a layer.

    ``leaves``: those of the pass.
    """

    def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
        output = leaves.reached(output)
        if output.is_leaf:
            output = output.clone()  # what comes next may work in place
        size = first_argument(args, kwargs).shape

        def receive(gradient: Tensor) -> None:
            for one in gathered:
                one.add(gradient.detach(), size)

        if output.requires_grad:  # not where the model itself turns gradients off
            output.register_hook(leaves.receiving(receive))
        return output

    return hook


class _Gathered:
    """Sums ``g g^T`` over the gradients g at the positions of one layer's output."""

    def __init__(self, layer: nn.Module, view: str) -> None:
        dense = DenseLayer.of(layer).without_weights()
        self.rows, self.convolution = Rows(layer, view), dense.module if view == "spatial" else None
        self.outputs = dense.sides(view)[0]
        self.sum = packed.held(torch.zeros(dense.groups, self.outputs, self.outputs, dtype=torch.float64))

    def add(self, gradient: Tensor, size: torch.Size) -> None:
        """Add the positions of one call. ``size``: the shape of its input."""
        gradient = wide(gradient)
        if isinstance(self.convolution, nn.Conv2d):
            gradient = _back_to_taps(self.convolution, gradient, size[-2])
        g = self.rows.outputs(gradient)
        self.sum = self.sum.to(g.device).add_(packed.held(g.transpose(1, 2) @ g).double())

    def mean(self, processes: Processes, count: int) -> Moment:
        """Return the sum over all processes, a prediction. ``count``: the predictions that they saw."""
        return packed.moment_of(processes.add_up(self.sum).div_(max(count, 1)), self.outputs)


def _back_to_taps(layer: nn.Conv2d, gradient: Tensor, height: int) -> Tensor:
    """Return what comes back to the O * kh channels between the factors of the spatial view, (N, O * kh, height, W).

    The kh x 1 convolution of full rank adds up kh channels an output, each shifted by one tap. Padding of another mode
    than zeros is taken as zeros.
    """
    taps, outputs, top = layer.kernel_size[0], layer.out_channels, layer._reversed_padding_repeated_twice[2]
    kernel = torch.eye(taps).to(gradient).view(1, taps, taps, 1).expand(outputs, -1, -1, -1)
    stride, dilation = (layer.stride[0], 1), (layer.dilation[0], 1)
    whole = F.conv_transpose2d(gradient, kernel, stride=stride, dilation=dilation, groups=outputs)
    return whole[:, :, top : top + height]
