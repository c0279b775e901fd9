"""Factors fitted once more, by least squares, to what the dense layers put out. No labels are used."""

from contextlib import suppress
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from spectrim.batches import Inputs, device_of, evaluating, first_sample, forward, hooked, to_device
from spectrim.batchnorm import norms_of
from spectrim.layers import Factored, FactoredConv2d, FactoredLinear, TuckerConv2d, composed, factors_of
from spectrim.moments import Rows, mask_of
from spectrim.objective import Objective

RIDGE = 1e-3  # of the mean second moment of an input: how much a change of the weight itself is held against a fit
ITERATIONS = 60


def refit(
    compressed: nn.Module, dense: nn.Module, objective: Objective, samples: int, split: str = "calibration"
) -> None:
    """Fit the factors of every factored layer of ``compressed``, in place, to the outputs of the layer of ``dense``.

    Layer by layer, in the order in which the model calls them: with x what flows into the layer of the compressed model
    and y what the dense layer puts out in the dense model, both for the same samples, the factors of ``W`` minimise
    ``E ||y - W x - b||^2``, the rank as it is, from those at hand. So a layer also makes up for what the layers before
    it lost. The offset b goes into the bias, or else into the running mean of the BatchNorm that the layer feeds;
    without either there is none. Nothing else of either model changes.

    Raises ``UserError`` for an empty split.
    """
    layers, followers = _laid_out(compressed, objective.example())
    for name in tqdm(layers, "refit", unit="layer", leave=False, disable=None):
        layer = cast(Factored, compressed.get_submodule(name))
        moments = _moments((compressed, dense), name, objective, samples, split)
        bias, follower = factors_of(layer)[-1].bias, followers.get(name)
        free = bias is not None or follower is not None
        W_gOI = _fit(layer, moments.centred() if free else moments)
        offset = (moments.y_gO - torch.einsum("goi,gi->go", W_gOI, moments.x_gI)).flatten()
        with torch.no_grad():
            if bias is not None:
                cast(Tensor, bias).copy_(offset)
            elif follower is not None:
                ours, theirs = (cast(Tensor, norms_of(model)[follower].running_mean) for model in (compressed, dense))
                ours.copy_(theirs - offset)


class _Moments(NamedTuple):
    """Second moments ``E[x x^T]``, ``E[y x^T]`` and means of inputs x and wanted outputs y; float64, g groups."""

    xx_gII: Tensor
    yx_gOI: Tensor
    x_gI: Tensor
    y_gO: Tensor

    def centred(self) -> "_Moments":
        """Of the deviations from the means."""
        x, y = self.x_gI, self.y_gO
        return self._replace(
            xx_gII=self.xx_gII - x.unsqueeze(2) * x.unsqueeze(1), yx_gOI=self.yx_gOI - y.unsqueeze(2) * x.unsqueeze(1)
        )


class _Reached(Exception):
    """What is wanted of a forward pass is known: the rest of it is not needed."""


def _laid_out(model: nn.Module, example: Inputs) -> tuple[list[str], dict[str, str]]:
    """The factored layers in the order of their first call, and the BatchNorm that takes the output of each, if any."""
    kinds = FactoredLinear, FactoredConv2d, TuckerConv2d
    outputs: dict[str, Tensor] = {}
    followers: dict[str, str] = {}

    def called(name: str, _: nn.Module, __: tuple, output: Tensor) -> None:
        outputs.setdefault(name, output)

    def fed(norm: str, _: nn.Module, inputs: tuple) -> None:
        followers.update({name: norm for name, output in outputs.items() if inputs[0] is output})

    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    handles = [module.register_forward_hook(partial(called, name)) for name, module in layers.items()]
    handles += [norm.register_forward_pre_hook(partial(fed, name)) for name, norm in norms_of(model).items()]
    with hooked(handles), evaluating(model), torch.no_grad():
        forward(model, to_device(first_sample(example), device_of(model)))
    return list(outputs), followers


def _moments(
    models: tuple[nn.Module, nn.Module], name: str, objective: Objective, samples: int, split: str
) -> _Moments:
    """Of what flows into layer ``name`` of the first model and of what the layer puts out in the second."""
    dense = cast(nn.Linear | nn.Conv2d, models[1].get_submodule(name))
    rows = Rows(dense, "channel" if isinstance(dense, nn.Conv2d) else "linear")
    seen: list[list[Tensor]] = [[], []]

    def into(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[0].append(inputs[0])
        raise _Reached

    def out_of(_: nn.Module, __: tuple, output: Tensor) -> None:
        seen[1].append(output)
        raise _Reached

    handles = [models[0].get_submodule(name).register_forward_pre_hook(into), dense.register_forward_hook(out_of)]
    sums: list[Tensor] = []
    count, device = 0, device_of(models[0])
    with hooked(handles), evaluating(models[0]), evaluating(models[1]), torch.no_grad():
        for inputs, _ in objective.first(split, samples, "refit"):
            inputs, mask = to_device(inputs, device), mask_of(inputs)
            for model in models:
                with suppress(_Reached):
                    forward(model, inputs)
            x, y = rows.inputs(seen[0].pop(), mask), rows.outputs(seen[1].pop(), mask)
            parts = [part.double() for part in (x.mT @ x, y.mT @ x, x.sum(1), y.sum(1))]
            sums = [total.add_(part) for total, part in zip(sums, parts, strict=True)] if sums else parts
            count += x.shape[1]
    return _Moments(*(total / max(count, 1) for total in sums))


def _fit(layer: Factored, moments: _Moments) -> Tensor:
    """Give the factors the weights that fit best near those that they have; the matrix they amount to, (g, O, I)."""
    factors = factors_of(layer)
    kept = [cast(Tensor, factor.weight).detach() for factor in factors]
    weights = [weight.to(torch.float64, memory_format=torch.contiguous_format, copy=True) for weight in kept]
    for weight in weights:  # LBFGS takes no other layout
        weight.requires_grad_(True)
    with torch.enable_grad():
        held = RIDGE * moments.xx_gII.diagonal(dim1=1, dim2=2).mean()
        xx = moments.xx_gII + held * torch.eye(moments.xx_gII.shape[-1]).to(moments.xx_gII)
        yx = moments.yx_gOI + held * composed(layer, weights).detach()
        scale = 1 / yx.square().sum().clamp_min(torch.finfo(yx.dtype).tiny).sqrt()
        optimizer = torch.optim.LBFGS(
            weights,
            max_iter=ITERATIONS,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            history_size=10,
            line_search_fn="strong_wolfe",
        )

        def error() -> Tensor:
            """``E ||y - W x||^2`` and the ridge, but for what no weight changes."""
            optimizer.zero_grad()
            W = composed(layer, weights)
            value = scale * ((W @ xx - 2 * yx) * W).sum()
            value.backward()
            return value

        optimizer.step(error)
    with torch.no_grad():
        for factor, weight in zip(factors, weights, strict=True):
            cast(Tensor, factor.weight).copy_(weight)
    return composed(layer, weights).detach()
