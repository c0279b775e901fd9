"""What every decomposer gives: all ranks of one layer at once, and the memory of those already decomposed."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from spectrim.factored.plan import Kept
from spectrim.tools.spill import Shelf

Keep = int | tuple[int, ...]
# The second moment E[x x^T] of a layer's inputs, shape (g, I, I), by the form that says what one input x is; of an
# embedding, whose x has a single 1, the diagonal alone, shape (g, I).
Moments = Mapping[str, Tensor]
NO_MOMENTS: Moments = MappingProxyType({})


def rank_of(keep: Keep) -> int:
    """Number of components in ``keep``."""
    return keep if isinstance(keep, int) else len(keep)


def value_at(curve: Tensor, keep: Keep) -> float:
    """Of a curve that adds up over dropped components (first-order changes, squared errors) its value at ``keep``."""
    if isinstance(keep, int):
        return float(curve[keep])
    return float(curve[0] + curve.diff()[list(keep)].sum())


class Spectrum(ABC):
    """All ranks of one layer. Decomposed once, cut often.

    Every curve is a float64 tensor on the CPU with ``max_rank + 1`` entries, entry k for rank k.
    """

    @property
    @abstractmethod
    def max_rank(self) -> int:
        """The rank that reproduces the layer."""

    @property
    @abstractmethod
    def form(self) -> str:
        """The form of the factored layers."""

    @property
    @abstractmethod
    def break_even(self) -> int:
        """The largest rank whose factors hold fewer parameters than the dense weight; 0 where there is none."""

    @abstractmethod
    def error(self) -> Tensor:
        """Frobenius norm of the change of the weight, for every rank."""

    @abstractmethod
    def largest_entry(self) -> Tensor:
        """Largest absolute entry of the change of the weight, for every rank."""

    @abstractmethod
    def first_order(self, gradient: Tensor) -> Tensor:
        """``<G, delta_k>`` for every rank; ``gradient`` has the shape of the layer's weight."""

    @abstractmethod
    def sizes(self, rank: int) -> tuple[int, ...]:
        """Parameters of each factor at ``rank``, without the bias, in the order in which the factors are applied."""

    @abstractmethod
    def factor(self, keep: Keep) -> nn.Module:
        """A drop-in layer with the components in ``keep``: a rank (the leading ones) or a set of indices."""

    def lay_aside(self, shelf: Shelf) -> None:  # noqa: B027 (not every spectrum has to)
        """Keep what takes room on ``shelf`` instead of in memory; here nothing, of a decomposition of small layers."""

    def cost(self, rank: int) -> int:
        """Parameters of all factors at ``rank``, without the bias."""
        return sum(self.sizes(rank))

    def rank_within(self, params: float) -> int:
        """The largest rank that costs no more than ``params``, 0 where none does; here for a cost of k * cost(1)."""
        return math.floor(params / self.cost(1))

    def kept(self, keep: Keep) -> Kept:
        """``keep`` as a plan says it, with the form of the factored layer as ``layers.shaped_like`` names it."""
        return Kept(keep, self.form)

    def weighted_error(self) -> Tensor:
        """``error`` in the norm that the decomposition keeps smallest: Frobenius, where it does not say otherwise."""
        return self.error()

    def relative_error(self) -> Tensor:
        """``error`` over the norm of the weight; zero for a zero weight."""
        curve = self.error()
        return curve / curve[0].clamp_min(1e-300)


class Decomposer(Protocol):
    """Settings of a decomposition. Hashable, so that one model's spectra are told apart by them."""

    @property
    def samples(self) -> int:
        """Calibration samples from which the second moments of each layer's inputs are taken; 0: no layer needs any."""

    @property
    def embeddings(self) -> bool:
        """Whether embeddings are factored too."""

    def forms(self, layer: nn.Module) -> tuple[str, ...]:
        """The forms of ``layer`` whose second moment ``spectrum`` is to be given; none where the weight is enough."""

    def spectrum(self, layer: nn.Module, moments: Moments = NO_MOMENTS) -> Spectrum:
        """Decompose ``layer`` (nn.Linear, nn.Conv2d, or nn.Embedding where ``embeddings``)."""


def content(tensors: Iterable[Tensor]) -> str:
    """A digest of the values. Neither address nor version tells: both may stay while ``weight.data`` is written to."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}{tensor.device}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


_known: "WeakKeyDictionary[nn.Module, dict[Any, Spectrum]]" = WeakKeyDictionary()


def spectrum_of(layer: nn.Module, decomposer: Decomposer, moments: Moments = NO_MOMENTS) -> Spectrum:
    """The spectrum of ``layer``, decomposed at the first call and remembered until weight, bias or moments change."""
    key = (decomposer, content([*layer.state_dict().values(), *moments.values()]))
    spectra = _known.setdefault(layer, {})
    if key not in spectra:
        for stale in [other for other in spectra if other[1] != key[1]]:
            del spectra[stale]
        spectra[key] = decomposer.spectrum(layer, moments)
    return spectra[key]
