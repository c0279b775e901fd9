"""Fit the factors of a layer by least squares, to convergence and whatever the units of inputs and outputs.

With the inputs x of one position (all pixels of a patch) and the wanted outputs y, the factors of W minimise
``E ||y - W x||^2 = tr(W xx W^T) - 2 tr(yx W^T)`` up to a constant, where ``xx = E[x x^T]`` and ``yx = E[y x^T]``.

Shape suffixes: g groups, O outputs, I inputs of a position, R components.
"""

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from spectrim.factored.base import FactoredLayer
from spectrim.factored.layers import FactoredConv2d
from spectrim.refit.variable_projection import by_variable_projection

STEPS = 60  # of LBFGS, for the fits that published numbers were made with
MANY_STEPS = 500  # enough to converge
CONVERGED = 1e-9  # a step that explains less than this part more of the outputs is the last of them


def has_fast_fit(layer: FactoredLayer) -> bool:
    """Return whether ``layer`` is a convolution as two without subspaces. Others take gradient steps."""
    return isinstance(layer, FactoredConv2d) and layer.first.groups == layer.second.groups


def fitted(
    layer: FactoredLayer, weights: Sequence[Tensor], xx_gII: Tensor, root_gII: Tensor, yx_gOI: Tensor
) -> list[Tensor]:
    """Return the plain ``weights`` of all factors that fit best, all in float64.

    A convolution as two has the least error of all in the channel view. In the other views it has that of a minimum
    near the W of full rank that fits best. Other layers have that of a minimum near the ``weights`` at hand.

    The fit is made in units in which an input has the mean square 1 and the W of full rank explains 1 of the outputs.

    ``xx_gII``, ``yx_gOI``: the second moments of each group.
    ``root_gII``: the Cholesky factor of each ``xx``.
    """
    x_unit = xx_gII.diagonal(dim1=1, dim2=2).mean(1).sqrt()[:, None, None]
    explained = torch.linalg.solve_triangular(root_gII, yx_gOI.mT, upper=False).norm(dim=(1, 2), keepdim=True)
    y_unit = torch.where(explained > 0, explained, x_unit)
    xx, root, yx = xx_gII / x_unit / x_unit, root_gII / x_unit, yx_gOI / x_unit / y_unit
    found = None
    if has_fast_fit(layer):
        with suppress(torch.linalg.LinAlgError):  # rounding may make a Gram matrix singular
            found = _of_two(layer, weights, xx, root, yx)
    if found is None:
        found = by_steps(layer, _balanced(weights, x_unit / y_unit), xx, yx, MANY_STEPS, CONVERGED)
    found[-1] = _times(y_unit / x_unit, found[-1])
    return found


def _of_two(layer: FactoredLayer, weights: Sequence[Tensor], xx: Tensor, root: Tensor, yx: Tensor) -> list[Tensor]:
    """Return both factors of a convolution. Of the ``weights`` at hand the shapes alone matter."""
    assert isinstance(layer, FactoredConv2d)
    sizes = [weight.unflatten(0, (len(xx), -1))[0].shape for weight in weights]
    kernel = [one * other for one, other in zip(sizes[0][2:], sizes[1][2:], strict=True)]  # either is 1
    found = []
    for xx_II, root_II, yx_OI in zip(xx, root, yx, strict=True):
        if layer.view == "channel":
            A, B = reduced_rank(root_II, yx_OI, layer.rank)
        else:
            W_OI = torch.cholesky_solve(yx_OI.mT, root_II).mT
            A, B = by_variable_projection(xx_II, yx_OI, W_OI, kernel, layer.view == "vertical", layer.rank)
            B = B.unflatten(1, (-1, layer.rank)).mT
        found.append((A.reshape(sizes[0]), B.reshape(sizes[1])))
    return [torch.cat(part) for part in zip(*found, strict=True)]


def reduced_rank(root_II: Tensor, yx_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best factors A (R, I) and B (O, R) of their rank, in closed form.

    The product is the least-squares fit, projected on its leading outputs (Izenman 1975).

    ``root_II``: the Cholesky factor L of the moment of the inputs. In inputs ``L^{-1} x`` the fit is ``yx L^{-T}``.
    """
    fit_IO = torch.linalg.solve_triangular(root_II, yx_OI.mT, upper=False)
    U = torch.linalg.eigh(fit_IO.mT @ fit_IO).eigenvectors[:, -rank:]
    A = torch.linalg.solve_triangular(root_II.mT, fit_IO @ U, upper=True).mT
    return A, U


def _balanced(weights: Sequence[Tensor], scale_g11: Tensor) -> list[Tensor]:
    """Return ``weights`` of equal norms in each group, whose product is that of the given ones times ``scale``."""
    norms = [weight.reshape(len(scale_g11), -1).norm(dim=1)[:, None, None] for weight in weights]
    norms = [torch.where(norm > 0, norm, 1.0) for norm in norms]
    each = (scale_g11.log() + sum(norm.log() for norm in norms)) / len(norms)  # a product of many may be out of range
    return [_times(each.exp() / norm, weight) for norm, weight in zip(norms, weights, strict=True)]


def _times(scale_g11: Tensor, weight: Tensor) -> Tensor:
    """Return the ``weight`` of a factor, that of each group times its ``scale``."""
    return (scale_g11 * weight.reshape(len(scale_g11), len(weight) // len(scale_g11), -1)).reshape(weight.shape)


def by_steps(
    layer: FactoredLayer, weights: list[Tensor], xx: Tensor, yx: Tensor, steps: int = STEPS, tolerance: float = 0.0
) -> list[Tensor]:
    """Return ``weights`` after ``steps`` of LBFGS towards the best fit, in place. Its way depends on their units.

    ``tolerance``: a step that changes the error, or every weight, by no more than this is the last.
    """
    for weight in weights:  # LBFGS takes no other layout
        weight.requires_grad_(True)
    with torch.enable_grad():
        scale = 1 / yx.square().sum().clamp_min(torch.finfo(yx.dtype).tiny).sqrt()
        optimizer = torch.optim.LBFGS(
            weights,
            max_iter=steps,
            tolerance_grad=0.0,
            tolerance_change=tolerance,
            history_size=10,
            line_search_fn="strong_wolfe",
        )

        def error() -> Tensor:
            """Return the error plus the ridge term, up to a constant. The same product gives the gradient."""
            optimizer.zero_grad()
            W = layer.product_of_plain(weights)
            Wxx = W.detach() @ xx
            W.backward(2 * scale * (Wxx - yx))
            return scale * ((Wxx - 2 * yx) * W.detach()).sum()

        optimizer.step(error)
    return [weight.detach() for weight in weights]
