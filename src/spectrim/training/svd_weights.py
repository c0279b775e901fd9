"""Train layers as U, S and Vh: unfold dense weights, truncate them during training, fold them back at the end."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spectrim.decomposers.matrix import MatrixSpectrum, from_matrix
from spectrim.factored import linalg


class SVDWeight(nn.Module):
    """A parametrization of the weight of a Linear or Conv2d as ``U diag(S) Vh``.

    The parameters are U (g, O, R), S (g, R) and Vh (g, R, I). Stride, padding, groups and bias stay in the layer.
    """

    def __init__(self, spectrum: MatrixSpectrum) -> None:
        super().__init__()
        self.template, self.view = spectrum.template, spectrum.view
        self.start: linalg.SVD | None = spectrum.svd

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Return the initial parameters, which are the factors of the spectrum. It can be called once."""
        assert self.start is not None
        parts, self.start = tuple(part.to(weight).contiguous() for part in self.start), None
        return parts

    def forward(self, U_OR: Tensor, S_R: Tensor, Vh_RI: Tensor) -> Tensor:
        with torch.autocast(U_OR.device.type, enabled=False):
            weight = from_matrix((U_OR * S_R.unsqueeze(-2)) @ Vh_RI, self.template, self.view)
        return weight.contiguous(memory_format=torch.channels_last) if weight.ndim == 4 else weight


def unfold(layer: nn.Module, spectrum: MatrixSpectrum) -> None:
    """Replace the weight of ``layer`` by the factors of ``spectrum`` as trained parameters, in place."""
    set_parametrization(layer, SVDWeight(spectrum))


def set_parametrization(layer: nn.Module, weight: nn.Module) -> None:
    """Let the module ``weight`` compute the weight of ``layer`` from trained parameters of its own, in place."""
    parametrize.register_parametrization(layer, "weight", weight.to(layer.weight.device))  # type: ignore[arg-type]
    for part in parametrization_of(layer).parameters():
        part.requires_grad_(True)


def bound_steps(layer: nn.Module) -> None:
    """Bound the gradients of the factors, so that no step moves the weight further than a step on the weight would.

    With ``W = sum_i s_i u_i v_i^T``, a step on u_i moves W by ``s_i^2 |v_i|^2`` times the projected gradient. The same
    factor is ``s_i^2 |u_i|^2`` for v_i and ``|u_i|^2 |v_i|^2`` for s_i. Where it is above 1, it divides the gradient.
    """
    U_OR, S_R, Vh_RI = svd_of(layer)

    def squares() -> tuple[Tensor, Tensor, Tensor]:
        return U_OR.detach().square().sum(-2), S_R.detach().square(), Vh_RI.detach().square().sum(-1)

    def of_U(gradient: Tensor) -> Tensor:
        _, s, v = squares()
        return gradient / (s * v).clamp_min(1.0).unsqueeze(-2)

    def of_S(gradient: Tensor) -> Tensor:
        u, _, v = squares()
        return gradient / (u * v).clamp_min(1.0)

    def of_V(gradient: Tensor) -> Tensor:
        u, s, _ = squares()
        return gradient / (s * u).clamp_min(1.0).unsqueeze(-1)

    for part, hook in ((U_OR, of_U), (S_R, of_S), (Vh_RI, of_V)):
        part.register_hook(hook)


def fold(layer: nn.Module) -> None:
    """Multiply the factors of ``layer`` and make its weight an ordinary parameter again, in place."""
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def parametrization_of(layer: nn.Module) -> nn.Module:
    """Return the module that computes the weight of ``layer``. Its parameters are ``original0`` and so on."""
    return layer.get_submodule("parametrizations.weight")


def svd_of(layer: nn.Module) -> linalg.SVD:
    """Return the parameters of an unfolded layer."""
    own = parametrization_of(layer)
    return linalg.SVD(*(own.get_parameter(f"original{i}") for i in range(3)))


def factor_names(name: str) -> list[str]:
    """Return the names of the factors of the unfolded layer ``name`` among the parameters of the model."""
    return [f"{name}.parametrizations.weight.original{i}" for i in range(3)]


@torch.no_grad()
def orthogonalise(layer: nn.Module, optimizer: torch.optim.SGD) -> None:
    """Make U and Vh orthonormal and S descending, in place.

    The product of the factors and the velocity of that product do not change.
    """
    parts = svd_of(layer)
    after = linalg.orthogonalised(parts)
    velocity = _velocity(optimizer, parts)
    if velocity is not None:
        _set_velocity(optimizer, parts, linalg.carried(velocity, parts, after))
    for part, value in zip(parts, after, strict=True):
        part.copy_(value)


@torch.no_grad()
def truncate(layer: nn.Module, rank: int, optimizer: torch.optim.SGD) -> None:
    """Keep the leading ``rank`` components of the parameters and of their momentum, in place."""
    parts = svd_of(layer)
    velocity = _velocity(optimizer, parts)
    for part, value in zip(parts, _leading(parts, rank), strict=True):
        part.grad, part.data = None, value  # The optimizer knows the parameter by its identity.
    if velocity is not None:
        _set_velocity(optimizer, parts, _leading(velocity, rank))


def _velocity(optimizer: torch.optim.SGD, parts: linalg.SVD) -> linalg.SVD | None:
    """Return the momentum of ``parts``, or None if a part has none yet."""
    buffers = [optimizer.state[part].get("momentum_buffer") for part in parts]
    known = [buffer for buffer in buffers if buffer is not None]
    return linalg.SVD(*known) if len(known) == len(buffers) else None


def _leading(parts: linalg.SVD, rank: int) -> linalg.SVD:
    U, S, Vh = parts
    leading = U[..., :rank], S[..., :rank], Vh[..., :rank, :]
    return linalg.SVD(*(part.clone(memory_format=torch.contiguous_format) for part in leading))


def _set_velocity(optimizer: torch.optim.SGD, parts: Iterable[Tensor], velocity: Iterable[Tensor]) -> None:
    for part, value in zip(parts, velocity, strict=True):
        optimizer.state[part]["momentum_buffer"] = value.to(part).contiguous()
