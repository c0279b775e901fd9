"""How far the slopes of the loss are believed: beyond chance, and as far as components that go together allow."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from spectrim.statistics.fisher import GateGradients

TRIED = (*(2 ** (step / 2) for step in range(11)), None)  # standard errors; None is no first order
Chosen = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]  # kept components by the predicted changes (R,) of all


def changes(row: GateGradients, errors: float | None) -> Tensor:
    """Return the predicted change of the loss if one component alone is removed, shape (R,), float64.

    ``errors``: standard errors that each slope is shrunk by; None leaves the first order out.
    """
    alone_R = _curvature(row.fisher)
    return alone_R if errors is None else alone_R - significant(row.given, errors)


def _curvature(fisher_NR: Tensor) -> Tensor:
    return fisher_NR.double().square().mean(0) / 2


def significant(given_NR: Tensor, errors: float) -> Tensor:
    """Return the mean slope of every gate, shrunk towards zero by its standard error. Shape (R,).

    The estimator is the positive-part James-Stein one. Greedy removal takes the lowest of thousands of slopes, and
    would find those that are low by chance. A slope below ``errors`` standard errors becomes zero, and a slope of many
    standard errors hardly changes.

    ``given_NR``: the slope of each sample, shape (N, R).
    """
    return _shrunk(*_slope_and_error(given_NR), errors)


def _slope_and_error(given_NR: Tensor) -> tuple[Tensor, Tensor]:
    given_NR = given_NR.double()
    return given_NR.mean(0), given_NR.std(0) / math.sqrt(len(given_NR))


def _shrunk(slope_R: Tensor, error_R: Tensor, errors: float) -> Tensor:
    tiny = torch.finfo(slope_R.dtype).tiny
    return slope_R * (1 - (errors * error_R / slope_R.abs().clamp_min(tiny)).square()).clamp_min(0)


def believed(rows: Mapping[str, GateGradients], choose: Chosen) -> float | None:
    """Return the standard errors by which slopes are best shrunk, one of ``TRIED``.

    Each slope may be certain, and their sum still wrong: the components that the slopes give up act on each other. So
    the components that half of the samples choose are judged on the other half. There the predicted change is
    ``-sum_i g_i + E (sum_i J_i)^2 / 2`` over the removed components i, with all Fisher entries off the diagonal. That
    is one number of a choice made elsewhere, so some dozen samples tell it.

    The halves are the first and the second: neighbouring samples may be parts of one text. None, which is no first
    order, where a half has less than two samples.

    ``choose``: makes the choice from the predicted changes of each layer.
    """
    count = min((len(row.fisher) for row in rows.values()), default=0)
    if count < 4:
        return None
    halves = [slice(0, count // 2), slice(count // 2, count)]
    curvatures = [{name: _curvature(row.fisher[own]) for name, row in rows.items()} for own in halves]
    slopes = [{name: _slope_and_error(row.given[own]) for name, row in rows.items()} for own in halves]

    def predicted(errors: float | None) -> float:
        total = 0.0
        for alone, slope, other in zip(curvatures, slopes, halves[::-1], strict=True):
            if errors is not None:  # the standard error of a half is the root of two times that of all
                alone = {name: own - _shrunk(*slope[name], errors / math.sqrt(2)) for name, own in alone.items()}
            total += _together(rows, choose(alone), other)
        return total

    return min(TRIED, key=predicted)


def _together(rows: Mapping[str, GateGradients], kept: Mapping[str, Tensor], samples: slice) -> float:
    """Return the change of the loss on some samples if all components that are not ``kept`` are removed."""
    slope, along = torch.zeros(()).double(), torch.zeros(()).double()
    for name, row in rows.items():
        removed = torch.ones(row.fisher.shape[1], dtype=torch.bool)
        removed[kept[name]] = False
        slope = slope + row.given[samples][:, removed].double().sum(1).mean()
        along = along + row.fisher[samples][:, removed].double().sum(1)
    return float(along.square().mean() / 2 - slope)
