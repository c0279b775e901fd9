"""Choose how firmly a refit holds the weight of a layer that sees few positions for its number of inputs.

Shape suffixes: g groups, O outputs, I inputs of a position.
"""

import math

import torch
from torch import Tensor, nn

from spectrim.refit.moments import Flows, Moments, mean_of, sums_of
from spectrim.refit.weighting import roots_of
from spectrim.statistics.processes import Processes

RIDGE = 1e-3  # penalty on a change of the weight, as a part of the inputs' mean second moment
RIDGES = (RIDGE, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
AMPLE = 5  # positions for each input; with as many the least ridge is hardly ever worse than another
FOLDS = 5


def few(rows: float, inputs: int) -> bool:
    """Return whether a layer that sees so many positions chooses its ridge."""
    return rows < AMPLE * inputs


def chosen_ridge(
    dense: nn.Module, flows: Flows, processes: Processes, moments: Moments, centred: bool, W_gOI: Tensor, G_gOO: Tensor
) -> float:
    """Return the ridge of ``RIDGES`` with the least error on samples that the fit has not seen.

    The samples are dealt to five folds in turn. Each fold is held out once, while the weight of full rank is fitted to
    the others. The error of that weight on the fold follows from the fold's moments. Layers with ``AMPLE`` positions
    for each input keep ``RIDGE``.

    ``moments``: those of all samples. ``centred``: whether an offset makes up for the means.
    ``W_gOI``: the weight that the ridge holds on to. ``G_gOO``: weights of the outputs' errors, as in the fit.
    """
    if not few(moments.rows, moments.xx_gII.shape[-1]):
        return RIDGE
    root_gOO = roots_of(G_gOO.to(W_gOI))[0]
    errors = torch.zeros(len(RIDGES), dtype=torch.float64)
    for fold in range(FOLDS):
        held_out = _moments_of_fold(dense, flows, processes, moments, fold)
        if not 0 < held_out.rows < moments.rows:  # fewer samples than folds
            continue
        seen = moments.without(held_out)
        if centred:
            seen, held_out = seen.centred(), held_out.around(seen.x_gI, seen.y_gO)
        errors += held_out.rows * _errors(seen, held_out, W_gOI, root_gOO)
    return RIDGES[int(errors.nan_to_num(math.inf).argmin())]


def _moments_of_fold(dense: nn.Module, flows: Flows, processes: Processes, moments: Moments, fold: int) -> Moments:
    """Return the moments of every fifth sample, beginning with sample ``fold``. ``moments``: those of all samples."""
    samples = torch.tensor([sum(len(x) for x in flows.x)])
    own, begin = Flows([], [], []), (fold - int(processes.gather(samples)[: processes.rank].sum())) % FOLDS
    for x, y, mask in zip(flows.x, flows.y, flows.masks, strict=True):
        every = slice(begin, None, FOLDS)
        begin = (begin - len(x)) % FOLDS
        if len(x[every]):
            own.x.append(x[every])
            own.y.append(y[every])
            own.masks.append(mask[every] if mask is not None and mask.shape == x.shape[:-1] else None)  # as ``Rows``
    if own.x:
        return mean_of(*sums_of(dense, own), processes)
    return mean_of(0, [torch.zeros_like(part) for part in moments.means], processes)  # others may have some


def rehearse_choice(moments: Moments, W_gOI: Tensor, G_gOO: Tensor) -> None:
    """Do what ``chosen_ridge`` does with the moments of all folds, to learn what it takes."""
    root_gOO = roots_of(G_gOO)[0]
    for _ in range(FOLDS):
        _errors(moments, moments, W_gOI, root_gOO)


def _errors(seen: Moments, held_out: Moments, W_gOI: Tensor, root_gOO: Tensor) -> Tensor:
    """Return the error on ``held_out`` of the weight that each ridge fits to ``seen``, up to one constant.

    An error e of the outputs counts as the square of ``root e``. NaN: a ridge under which there is no fit.
    """
    unit = seen.xx_gII.diagonal(dim1=1, dim2=2).mean()
    wanted_gOI, kept_gOI = root_gOO @ seen.yx_gOI, root_gOO @ W_gOI
    target_gOI, errors = 2 * root_gOO @ held_out.yx_gOI, list[float]()
    for ridge in RIDGES:
        held = seen.xx_gII.clone()
        held.diagonal(dim1=1, dim2=2).add_(ridge * unit)
        root, failed = torch.linalg.cholesky_ex(held)
        if bool(failed.any()):
            errors.append(math.nan)
            continue
        W = torch.cholesky_solve((wanted_gOI + ridge * unit * kept_gOI).mT, root).mT  # with the root before it
        errors.append(float((W * (W @ held_out.xx_gII - target_gOI)).sum()))
    return torch.tensor(errors, dtype=torch.float64)
