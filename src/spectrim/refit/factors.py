"""Fit the factors of a compressed model to the outputs of the dense layers, by least squares and without labels."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectrim.batches import Inputs, cloned, device_of, evaluating, first_argument, forward, to_device
from spectrim.errors import UserError
from spectrim.factored.base import FactoredLayer
from spectrim.factored.layers import FactoredLinear
from spectrim.factored.linalg import in_precision
from spectrim.refit.layer_barrier import Lockstep
from spectrim.refit.layers_to_fit import OF_VALUES, layers_to_fit
from spectrim.refit.least_squares import by_steps, fitted, has_fast_fit, reduced_rank
from spectrim.refit.moments import Flows, Moments, moments_of
from spectrim.refit.ridge import RIDGE, chosen_ridge, rehearse_choice
from spectrim.refit.weighting import RefitBy, Weights, mixed, roots_of, weights_of
from spectrim.statistics.batchnorm import norms_of
from spectrim.statistics.objective import Objective
from spectrim.statistics.padding import padding_of
from spectrim.statistics.processes import Processes
from spectrim.statistics.shifted_moments import LARGE
from spectrim.surgery.given_model import copied, unchanged
from spectrim.surgery.stand_ins import not_repeated
from spectrim.tools import resume
from spectrim.tools.content import of_state
from spectrim.tools.hooks import hooked
from spectrim.tools.live import Bar


def refit(
    compressed: nn.Module,
    dense: nn.Module,
    objective: Objective,
    samples: int,
    weights: Weights | None = None,
) -> list[str]:
    """Fit the factors of the factored layers of ``compressed``, in place, to the outputs of the layers of ``dense``.

    The layers are fitted in the order in which the model calls them. Let x be the input of a layer in the compressed
    model and y the output of the dense layer in the dense model, for the same samples. The factors of ``W`` then
    minimise ``E ||y - W x - b||^2`` at their rank, beginning with those at hand. So a layer also makes up for what the
    layers before it lost. The offset b goes into the bias, or else into the running mean of the BatchNorm that the
    layer feeds; without either there is none.

    ``samples``: number of calibration samples to read, in whole batches.
    ``weights``: G of layers, from ``weighting.output_weights``. The squared norm of an error e is then ``e^T G e``,
        damped (``weighting.roots_of``). In layers without G, and with None, all outputs count alike.

    Returns a note for each factored layer that is not fitted: one called several times in a pass, whose later inputs
    depend on the fit, or one whose rows depend on the values of a batch, such as an expert. An embedding is not fitted,
    as its inputs are the same in both models, nor is a head that shares its factors. Nothing is fitted where the dense
    model gives other outputs at each pass or in each thread.

    Raises ``UserError`` for an empty calibration split.
    """
    device = device_of(compressed)
    # A loader may use the memory of a batch again.
    batches = [cloned(to_device(inputs, device)) for inputs, _ in objective.first("calibration", samples, "read")]
    # A search refits many sizes of one model.
    why = objective.remembered(dense, "steady", lambda: of_state(dense), lambda: not_repeated(dense, batches[0]))
    if why:  # the outputs to fit and the inputs would be those of different draws, or of other threads
        return [f"not refitted: {why}"]
    processes = objective.processes("calibration")
    with unchanged(compressed, fitted=True):
        layers, followers, notes = layers_to_fit(compressed, dense, batches, processes)
        with Bar(desc="refit", total=len(layers), unit="layer", leave=False) as bar:

            def met(name: str, flows: Flows) -> None:
                if processes.in_any({name} if _apart(dense.get_submodule(name), flows) else (), [name]):
                    notes.append(f"{name}: not refitted: {OF_VALUES}")
                    return
                try:
                    G_gOO = weights_of(weights, name)
                    _fit_layer((compressed, dense), name, followers.get(name), flows, processes, G_gOO)
                except UserError as error:
                    raise UserError(f"layer {name}: {error}") from None
                bar.update()

            with evaluating(compressed), evaluating(dense):
                _in_step((compressed, dense), layers, batches, met)
    return notes


def _apart(layer: nn.Module, flows: Flows) -> bool:
    """Return whether the models send other rows of a batch through ``layer``, as where an output decides on the way."""
    rows = slice(0, 1) if isinstance(layer, nn.Conv2d) else slice(0, -1)
    return any(x.shape[rows] != y.shape[rows] for x, y in zip(flows.x, flows.y, strict=True))


def _fit_layer(
    models: tuple[nn.Module, nn.Module],
    name: str,
    follower: str | None,
    flows: Flows,
    processes: Processes,
    G_gOO: Tensor | None,
) -> None:
    layer = models[0].get_submodule(name)
    assert isinstance(layer, FactoredLayer)
    dense, bias = models[1].get_submodule(name), layer.bias
    moments, centred = moments_of(dense, flows, processes), bias is not None or follower is not None
    ridge = RIDGE
    if G_gOO is not None:
        ridge = chosen_ridge(dense, flows, processes, moments, centred, layer.product_of_plain(_wide(layer)), G_gOO)
    W_gOI = _resumed_fit(layer, moments.centred() if centred else moments, G_gOO, ridge)
    offset = (moments.y_gO - torch.einsum("goi,gi->go", W_gOI, moments.x_gI)).flatten()
    with torch.no_grad():
        if bias is not None:
            bias.copy_(in_precision(offset, bias.dtype))
        elif follower is not None:
            ours, theirs = (cast(Tensor, norms_of(model)[follower].running_mean) for model in models)
            ours.copy_(theirs - offset)


def _in_step(
    models: tuple[nn.Module, nn.Module],
    layers: Sequence[str],
    batches: Sequence[Inputs],
    met: Callable[[str, Flows], None],
) -> None:
    """Pass the batches through both models and call ``met`` at each layer, before any of the passes goes on.

    One pass serves all layers; each sees the earlier ones already fitted. Each pass has modules of its own over
    the same weights: what a model keeps on itself during a pass does not reach another batch. Memory: what flows at a
    layer, for all batches. Raises ``UserError`` where a batch does not come by all layers in their order.
    """
    nothing = [torch.empty(0)] * len(batches)
    flows = Flows(list(nothing), list(nothing), [None] * len(batches))
    dense = {name: models[1].get_submodule(name) for name in layers}
    paddings = [padding_of(models[1], dense.values(), inputs) for inputs in batches]

    def all_arrived(station: int) -> None:
        name = layers[station]
        flows.masks = [own.at_next_call(dense[name], x.shape[:-1]) for own, x in zip(paddings, flows.x, strict=True)]
        met(name, flows)

    passes = Lockstep(all_arrived)

    def through(model: nn.Module, values: list[Tensor], index: int) -> None:
        done = 0

        def arrived(name: str, _: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor | None = None) -> None:
            nonlocal done
            if done < len(layers) and name == layers[done]:
                values[index] = (first_argument(args, kwargs) if output is None else output).detach()
                done += 1
                passes.station()

        own = _over_same_weights(model)
        hooks = [(own.get_submodule(name), partial(arrived, name)) for name in layers]
        with hooked(before=hooks) if model is models[0] else hooked(after=hooks), torch.no_grad():
            forward(own, batches[index])
        if done < len(layers):
            raise UserError(f"the model does not call layer {layers[done]} on every batch, in the same order")

    sides = zip(models, (flows.x, flows.y), strict=True)
    passes.run([partial(through, *side, index) for side in sides for index in range(len(batches))])


def _over_same_weights(model: nn.Module) -> nn.Module:
    """Return a copy of the modules of ``model`` with the same parameters and buffers, not copies of them."""
    return copied(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


def _resumed_fit(layer: FactoredLayer, moments: Moments, G_gOO: Tensor | None, ridge: float) -> Tensor:
    """Do what ``_fit`` does, or take up the factors that an earlier process has fitted to the same moments."""
    if resume.current() is None:
        return _fit(layer, moments, G_gOO, ridge)

    def made() -> dict[str, Tensor]:
        fit = _fit(layer, moments, G_gOO, ridge)
        return {"product": fit, **layer.state_dict()}  # pivoted factors have positions, too

    before = [repr(layer), *(value.clone() for value in layer.state_dict().values())]
    given = (*moments, ridge) if G_gOO is None else (*moments, ridge, G_gOO, "converged")  # an older folder differs
    found = resume.tensors("fit", lambda: [*before, *given], made)
    product = found.pop("product").to(moments.xx_gII.device)
    layer.load_state_dict(found)
    return product


def rehearse_fit(layer: FactoredLayer, by: RefitBy, few: bool = False) -> None:
    """Fit ``layer`` to random moments, in place, to learn what a fit takes. Memory: as a fit.

    ``few``: whether the layer chooses its ridge.
    """
    with torch.no_grad():
        W = layer.product([factor.weight.double() for factor in layer.factors])
        x = torch.randn(len(W), 64, W.shape[-1], dtype=W.dtype, device=W.device)
        xx = x.mT @ x / 64 + torch.eye(W.shape[-1]).to(W)
        moments = Moments(64, xx, (W + torch.randn_like(W) * W.std()) @ xx, x.mean(1), torch.zeros_like(W[..., 0]))
    G_gOO = W @ W.mT if by == "loss" else None
    if few and G_gOO is not None:
        rehearse_choice(moments, W, G_gOO)
    _fit(layer, moments, G_gOO)


def _wide(layer: FactoredLayer) -> list[Tensor]:
    """Return the plain weights of all factors in float64, not those of the layer themselves."""
    kept = layer.plain([factor.weight.detach() for factor in layer.factors])
    return [weight.to(torch.float64, memory_format=torch.contiguous_format, copy=True) for weight in kept]


def _fit(layer: FactoredLayer, moments: Moments, G_gOO: Tensor | None = None, ridge: float = RIDGE) -> Tensor:
    """Set the factors to the best fit near their current weights. Return their product, of shape (g, O, I).

    ``ridge``: penalty on a change of the product, as a part of the inputs' mean second moment.

    The norm of G is the plain one of outputs ``G^(1/2) y``, and the last factor mixes outputs freely. So the fit is a
    plain one to those outputs, whose last factor is mixed back.
    """
    weights, dtype = _wide(layer), layer.factors[-1].weight.dtype
    now = layer.product_of_plain(weights)
    held, xx, root = _held(moments.xx_gII, ridge)
    if not held:  # nothing flows in
        return now
    yx = moments.yx_gOI + held * now
    back_gOO = None
    if G_gOO is not None:
        root_gOO, back_gOO = roots_of(G_gOO.to(yx))
        yx, weights[-1] = root_gOO @ yx, mixed(root_gOO, weights[-1])
    if isinstance(layer, FactoredLinear) and isinstance(layer.first, nn.Linear):
        weights = list(reduced_rank(root[0], yx[0], layer.rank))
    elif G_gOO is not None or (has_fast_fit(layer) and yx.numel() >= LARGE):
        weights = fitted(layer, weights, xx, root, yx)
    else:  # the fit that published numbers were made with
        weights = by_steps(layer, weights, xx, yx)
    if back_gOO is not None:
        weights[-1] = mixed(back_gOO, weights[-1])
    fitted_product = layer.product_of_plain(weights)
    if not all(weight.to(dtype).isfinite().all() for weight in weights):
        return now  # what flows in is next to nothing, and its squares vanish
    layer.fill_plain(weights)
    return fitted_product


def _held(xx_gII: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return a penalty on a change of the weight, the moments with it on the diagonal, and their Cholesky factors.

    The penalty is 0 where nothing flows in. Inputs that hardly differ from their means lose the deviations to rounding.
    Their moments may then have negative eigenvalues, so the error would have no minimum. A larger penalty holds the
    weight in these directions.
    """
    penalty = ridge * xx_gII.diagonal(dim1=1, dim2=2).mean()
    held = xx_gII.clone()
    held.diagonal(dim1=1, dim2=2).add_(penalty)
    root, failed = torch.linalg.cholesky_ex(held)
    if penalty and bool(failed.any()):
        more = -2 * torch.linalg.eigvalsh(xx_gII).min().clamp(max=0)
        held.diagonal(dim1=1, dim2=2).copy_(xx_gII.diagonal(dim1=1, dim2=2) + (penalty + more))
        return penalty + more, held, torch.linalg.cholesky(held)
    return penalty, held, root
