"""The spectrum of a layer: all of its ranks at once. It is remembered while the layer is unchanged."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from spectrim.factored.base import FactoredLayer
from spectrim.factored.plan import Keep, Kept
from spectrim.tools.content import content
from spectrim.tools.spill import SpillFolder

# The second moment E[x x^T] of a layer's inputs, shape (g, I, I), by the view that says what one input x is. Of an
# embedding, whose x has a single 1, only the diagonal, shape (g, I).
Moments = Mapping[str, Tensor]
# The key of E[h h^T], shape (g, O, O), of an embedding: h is an input of a linear layer with the same weight.
HEAD = "head"
Embeddings = bool | Literal["tied"]  # whether embeddings are factored too; tied: those alone that share their weight
NO_MOMENTS: Moments = MappingProxyType({})


def outputs_of(view: str) -> str:
    """Return the key in ``Moments`` of the second moment of gradients at a layer's outputs, of shape (g, O, O)."""
    return f"outputs {view}"


def value_at(curve: Tensor, keep: Keep) -> float:
    """Return the value at ``keep`` of a curve that adds up over dropped components.

    First-order changes and squared errors do.
    """
    if isinstance(keep, int):
        return float(curve[keep])
    return float(curve[0] + curve.diff()[list(keep)].sum())


class Spectrum(ABC):
    """All ranks of one layer. The layer is decomposed once and can then be factored at any rank.

    Every curve is a float64 tensor on the CPU with ``max_rank + 1`` entries, entry k for rank k.
    """

    @property
    @abstractmethod
    def max_rank(self) -> int:
        """The rank that reproduces the layer."""

    @property
    @abstractmethod
    def break_even(self) -> int:
        """The largest rank whose factors hold fewer parameters than the dense weight; 0 where there is none."""

    @abstractmethod
    def error(self) -> Tensor:
        """Return the Frobenius norm of the change of the weight, for every rank."""

    @abstractmethod
    def largest_entry(self) -> Tensor:
        """Return the largest absolute entry of the change of the weight, for every rank."""

    @abstractmethod
    def first_order(self, gradient: Tensor) -> Tensor:
        """Return ``<G, delta_k>`` for every rank. ``gradient`` has the shape of the layer's weight."""

    @abstractmethod
    def sizes(self, rank: int) -> tuple[int, ...]:
        """Return the parameters of each factor at ``rank``, without the bias, in the order of the factors."""

    def multiplied(self, rank: int) -> tuple[int, ...]:
        """Return how many numbers of each factor a position is multiplied by: by default ``sizes``."""
        return self.sizes(rank)

    def plain(self) -> "Spectrum":
        """Return the same spectrum with plain factors, in which each component is a channel between the two."""
        return self

    @abstractmethod
    def kept(self, keep: Keep) -> Kept:
        """Return the entry of a plan for ``keep``: with the form of the layer that ``factor`` returns."""

    @abstractmethod
    def factor(self, keep: Keep) -> FactoredLayer:
        """Return a drop-in layer with the components in ``keep``: a rank (the leading ones) or a set of indices."""

    def spill(self, folder: SpillFolder) -> None:  # noqa: B027 (not every spectrum has to)
        """Move large tensors from memory to ``folder``. The default keeps them, for decompositions of small layers."""

    def cost(self, rank: int) -> int:
        """Return the parameters of all factors at ``rank``, without the bias."""
        return sum(self.sizes(rank))

    def rank_within(self, params: float) -> int:
        """Return the largest rank that costs at most ``params``, 0 where none does.

        The default is for a cost of k * cost(1).
        """
        return math.floor(params / self.cost(1))

    def weighted_error(self) -> Tensor:
        """Return ``error`` in the norm that the decomposition minimises: by default the Frobenius norm."""
        return self.error()

    def relative_error(self) -> Tensor:
        """Return ``error`` over ``norm``; zero for a zero weight."""
        return self.error() / self.norm.clamp_min(1e-300)

    @property
    def norm(self) -> Tensor:
        """The Frobenius norm of the weight, float64."""
        return self.error()[0]

    def relative_error_at(self, keep: Keep) -> float:
        """Return ``relative_error`` at ``keep``. The default is for components whose squared errors add up."""
        return math.sqrt(max(0.0, value_at(self.relative_error().square(), keep)))


@runtime_checkable
class Decomposer(Protocol):
    """Settings of a decomposition. They are hashable, because they are part of the key of a remembered spectrum."""

    @property
    def samples(self) -> int:
        """Number of calibration samples for the second moments of each layer's inputs; 0 where none are needed."""

    @property
    def embeddings(self) -> Embeddings:
        """Whether embeddings are factored too. Tied: only those that share their weight with other layers."""

    def views(self, layer: nn.Module) -> tuple[str, ...]:
        """Return the views of ``layer`` whose second moments ``spectrum`` needs; none where the weight is enough."""

    def spectrum(self, layer: nn.Module, moments: Moments = NO_MOMENTS) -> Spectrum:
        """Decompose ``layer``: a Linear, a Conv2d, or with ``embeddings`` an Embedding."""


@dataclass(frozen=True)
class Directions:
    """What is differentiated to get the gradients at the outputs of layers.

    ``labels``: the loss at the given targets. Otherwise a random direction of the scores, whose gradients have the
        Fisher information as second moment (``losses.fisher_direction``).
    ``top``: number of highest scores of each prediction that count; None: all.
    ``seed``: seed of the random directions.
    """

    labels: bool = False
    top: int | None = None
    seed: int = 0


@runtime_checkable
class NeedsGradients(Protocol):
    """A decomposer that may also need the second moments of the gradients at the outputs of each layer."""

    @property
    def directions(self) -> Directions | None:
        """The gradients that ``spectrum`` needs, in the same views as the inputs; None where it needs none."""


def directions_of(decomposer: object) -> Directions | None:
    """Return the gradients whose second moments ``decomposer`` needs; None where it needs none."""
    return decomposer.directions if isinstance(decomposer, NeedsGradients) else None


_known: "WeakKeyDictionary[nn.Module, dict[Any, Spectrum]]" = WeakKeyDictionary()


def spectrum_of(layer: nn.Module, decomposer: Decomposer, moments: Moments = NO_MOMENTS) -> Spectrum:
    """Return the spectrum of ``layer``. It is remembered until the weight, the bias or the moments change."""
    key = (decomposer, content([*layer.state_dict().values(), *moments.values()]))
    spectra = _known.setdefault(layer, {})
    if key not in spectra:
        for stale in [other for other in spectra if other[1] != key[1]]:
            del spectra[stale]
        spectra[key] = decomposer.spectrum(layer, moments)
    return spectra[key]
