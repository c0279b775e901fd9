"""The decompositions of matrices, taken up from a folder where an earlier process has made them (``resume``)."""

from torch import Tensor

from spectrim.factored import large, linalg
from spectrim.tools import resume


def svd(W_OI: Tensor) -> linalg.SVD:
    """Return ``large.svd`` of one matrix or of a batch. Raises ``UserError`` for NaN or infinity."""
    found = resume.tensors("svd", lambda: [W_OI], lambda: large.svd(W_OI)._asdict())
    return linalg.SVD(**{name: part.to(W_OI.device) for name, part in found.items()})


def left_vectors(W_OI: Tensor, C: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return the left singular vectors and the singular values of ``W C^(1/2)``. Raises ``UserError`` for NaN."""

    def made() -> dict[str, Tensor]:
        U_OR, S_R = large.left_vectors(W_OI, C, ridge)
        return {"U_OR": U_OR, "S_R": S_R}

    found = resume.tensors("whitened", lambda: [W_OI, C, ridge], made)
    return found["U_OR"].to(W_OI.device), found["S_R"].to(W_OI.device)


def largest_entry_of_error(factors: linalg.SVD) -> Tensor:
    """Return ``linalg.largest_entry_of_error``, on the CPU."""
    found = resume.tensors(
        "largest", lambda: factors, lambda: {"entry": linalg.largest_entry_of_error(factors).double().cpu()}
    )
    return found["entry"]
