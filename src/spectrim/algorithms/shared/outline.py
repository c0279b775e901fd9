"""The shapes of a layer, and the memory that its decomposition takes, before it is decomposed."""

import logging
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from spectrim.batches import device_of
from spectrim.decomposers.spectrum import Decomposer, directions_of
from spectrim.factored.base import FactoredLayer
from spectrim.factored.completion import Completion
from spectrim.factored.dense import DenseLayer
from spectrim.factored.forms import EmbeddingForm, Form, PivotedForm, PlainForm
from spectrim.factored.large import WHITENED
from spectrim.factored.linalg import break_even_rank, factor_sizes, most_pivots
from spectrim.statistics import packed
from spectrim.surgery.cost import parameters
from spectrim.tools.free_memory import free_memory, in_gb

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outline:
    """The shape of a layer, without its decomposition.

    ``matrices``: number of matrices of ``rows`` x ``columns`` that the weight is read as.
    ``moments``: sizes of the second moments that the decomposer takes, one or two for each view.
    ``both_sides``: whether there are two for each view, of the inputs and of the gradients at the outputs.
    ``pivoted``: whether pivoted factors are stored where the rank allows them; ``form`` is that of plain ones.
    """

    name: str
    module: nn.Module
    form: PlainForm | EmbeddingForm
    matrices: int
    rows: int
    columns: int
    moments: tuple[int, ...]
    both_sides: bool
    pivoted: bool

    @classmethod
    def of(cls, name: str, module: nn.Module, decomposer: Decomposer) -> "Outline":
        """Return the outline of a layer, in the channel view where ``decomposer`` has no view of its own."""
        dense, parts = DenseLayer.of(module), int(getattr(decomposer, "subspaces", 1))
        view = dense.view(getattr(decomposer, "view", "channel"))
        parts = parts if dense.inputs % parts == 0 else 1
        form = EmbeddingForm() if isinstance(module, nn.Embedding) else PlainForm(view, parts)
        both = directions_of(decomposer) is not None
        sides = (1, 0) if both else (1,)
        moments = tuple(dense.sides(own)[side] for own in decomposer.views(module) for side in sides)
        pivoted = getattr(getattr(decomposer, "base", decomposer), "factors", "plain") == "pivoted"
        return cls(name, module, form, dense.groups * parts, *dense.sides(view, parts), moments, both, pivoted)

    def plain(self) -> "Outline":
        """Return the same outline with plain factors."""
        return replace(self, pivoted=False)

    @property
    def full_rank(self) -> int:
        return min(self.rows, self.columns)

    @property
    def component(self) -> int:
        """Number of parameters of one component."""
        return self.matrices * (self.rows + self.columns)

    @property
    def params(self) -> int:
        return self.matrices * self.rows * self.columns

    @property
    def break_even(self) -> int:
        """The largest rank that saves parameters."""
        return break_even_rank(self.rows, self.columns, self.pivoted)

    def form_at(self, rank: int) -> Form:
        """Return the form of the factors of ``rank``."""
        if not self._is_pivoted(rank):
            return self.form
        return EmbeddingForm(pivoted=True) if isinstance(self.form, EmbeddingForm) else PivotedForm(self.form.view)

    def cost(self, rank: int) -> int:
        """Return the parameters of the factors of ``rank``."""
        return self.matrices * sum(factor_sizes(self.rows, self.columns, rank, self._is_pivoted(rank)))

    def rank_within(self, params: float) -> int:
        """Return the largest rank that costs at most ``params``, 0 where none does."""
        return bisect_right(range(self.full_rank + 1), params, key=self.cost) - 1

    def _is_pivoted(self, rank: int) -> bool:
        return self.pivoted and rank <= most_pivots(self.rows, self.columns)

    @property
    def moment_entries(self) -> int:
        """Number of entries of the second moments of one matrix. That of an embedding's inputs is diagonal."""
        return sum(size if diagonal else size**2 for size, diagonal in self._moments())

    @property
    def moment_bytes(self) -> int:
        """Bytes that are held of the second moments, in float64."""
        entries = (size if diagonal else packed.entries(size) for size, diagonal in self._moments())
        return 8 * self.matrices * sum(entries)

    def _moments(self) -> list[tuple[int, bool]]:
        """Return the size of each second moment, and whether it is diagonal."""
        embedding, sides = isinstance(self.module, nn.Embedding), 2 if self.both_sides else 1
        return [(size, embedding and place % sides == 0) for place, size in enumerate(self.moments)]

    @property
    def decomposition(self) -> float:
        """Operations of the decomposition, up to a factor: an SVD, and the root of each second moment.

        Large matrices have the Gram matrix in place of an SVD, and no root of the inputs' moment
        (``large.left_vectors``). The root of the gradients' moment is triangular. A diagonal moment, as that of an
        embedding, has a root for next to nothing.
        """
        rows, columns, rank = self.rows, self.columns, self.full_rank
        diagonal = isinstance(self.module, nn.Embedding)
        of_inputs = self.moments[::2] if self.both_sides else self.moments
        if of_inputs and not diagonal and rank >= WHITENED:
            orthogonal = 6 * rows * rank**2 if rows > columns else 0  # the rows of a tall matrix
            one = 12 * rank**3 + 2 * rank * columns * (columns + rank) + orthogonal
            operations: float = len(of_inputs) * one
        else:
            roots = 0 if diagonal else sum(12 * size**3 for size in of_inputs)
            operations = 20 * rank**2 * max(rows, columns) + roots
        if self.both_sides:
            operations += rows**3 / 3 + 2 * rows**2 * (columns + rank)
        return self.matrices * operations

    def factor(self, rank: int) -> FactoredLayer:
        """Return a factored layer with random weights. It has the name that it has in a spectrum."""
        layer = self.form_at(rank).layer_for(self.module, rank)
        with torch.no_grad():
            for factor in layer.factors:
                factor.weight.normal_(std=factor.weight[0].numel() ** -0.5)
                if isinstance(factor, Completion):
                    factor.start()
            if layer.bias is not None:
                layer.bias.zero_()
        return layer


def block_of(layers: Sequence[Outline], layers_at_once: int | None) -> float:
    """Return the part of the layers whose decompositions are in memory at once."""
    return 1.0 if layers_at_once is None else min(1.0, layers_at_once / len(layers))


def decomposing_bytes(
    model: nn.Module, layers: Sequence[Outline], layers_at_once: int | None, moments: int | None = None
) -> dict[str, float]:
    """Return the bytes that every selection takes: ``held`` in decompositions, and the peaks of its two first parts.

    ``decompose``: beside what is held, the second moments of a block, and the work space of the largest layer.
    ``build``: beside what is held, a copy of the model, and the one that is compressed.

    ``moments``: bytes of all second moments; None: as many as there are where no layers hold one together.
    """
    block = block_of(layers, layers_at_once)
    spectra = [8 * layer.full_rank * layer.component for layer in layers]
    held = sum(spectra) if layers_at_once is None else max(spectra)  # each is spilled before the next
    largest = max(8 * (4 * layer.params + 6 * layer.moment_entries) for layer in layers)
    gathered = block * (sum(layer.moment_bytes for layer in layers) if moments is None else moments)
    item = next(model.parameters()).element_size()
    return {"held": held, "decompose": held + gathered + largest, "build": held + 2 * item * parameters(model)}


def warn_if_short(
    model: nn.Module, layers: Mapping[str, nn.Module], decomposer: Decomposer, layers_at_once: int | None
) -> None:
    """Warn in one line where the memory that is free will not do for the decompositions.

    It refuses nothing, because the system may have more to give, such as swap. Nothing is known of other devices.
    """
    if not layers or device_of(model).type != "cpu":
        return
    outlines = [Outline.of(name, module, decomposer) for name, module in layers.items()]
    needed, free = max(decomposing_bytes(model, outlines, layers_at_once).values()), free_memory()
    if needed > free:
        fewer = "layers_at_once=8" if layers_at_once is None else f"less than layers_at_once={layers_at_once}"
        LOG.warning("needs about %s of memory, and %s are free; give %s", in_gb(needed), in_gb(free), fewer)
