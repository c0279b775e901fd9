"""How a factored layer is stored. Forms are values; only JSON holds them as text."""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from reprlib import repr as short
from typing import ClassVar

from torch import nn

from spectrim.errors import UserError
from spectrim.factored import linalg
from spectrim.factored.base import FactoredLayer
from spectrim.factored.dense import DenseLayer, with_article
from spectrim.factored.layers import FactoredConv2d, FactoredEmbedding, FactoredLinear, TuckerConv2d, pivoted_like

NUMBER = "([1-9][0-9]{0,17})"  # no layer has more digits


class Form(ABC):
    """How a factored layer is stored. A further form is a further subclass, listed in ``FORMS``."""

    pattern: ClassVar[re.Pattern[str]]

    @abstractmethod
    def to_text(self) -> str:
        """Return the text that stands for this form in JSON."""

    @staticmethod
    def from_text(text: object) -> "Form":
        """Return the form that ``text`` stands for. Raises ``UserError`` where it is not from ``to_text``."""
        for kind in FORMS:
            found = kind.pattern.fullmatch(text) if isinstance(text, str) else None
            if found and (form := kind.matched(found.groups())).to_text() == text:
                return form
        raise UserError(f"{short(text)} is no form of a factored layer; if it is new, update spectrim")

    @classmethod
    @abstractmethod
    def matched(cls, parts: tuple[str | None, ...]) -> "Form":
        """Return the form from the groups of a match of ``pattern``."""

    @abstractmethod
    def layer_for(self, dense: nn.Module, rank: int) -> FactoredLayer:
        """Return the uninitialised factored layer of this form that replaces ``dense``.

        ``rank`` and the numbers of the form may come from a file. They are checked before memory is taken. Raises
        ``UserError`` where ``dense`` cannot take this form, or where a number is larger than the layer allows.
        """

    def refuse(self, dense: nn.Module) -> UserError:
        """Return the error for a layer that cannot take this form."""
        return UserError(f"{with_article(dense)} has no factored form {self.to_text()!r}")

    def require(self, rank: int, most: int) -> None:
        """Raise ``UserError`` where ``rank`` is not between 1 and ``most``."""
        if rank > most:
            raise UserError(
                f"rank {short(rank)} of form {self.to_text()!r} is above the full rank of this layer, {most}"
            )
        if rank < 1:
            raise UserError(f"rank {short(rank)} of form {self.to_text()!r} is below 1")


@dataclass(frozen=True)
class PlainForm(Form):
    """Two factors of the weight, read as a matrix in one ``view``: linear, channel, spatial or vertical.

    ``subspaces``: number of parts of the inputs of each group. Each part has a first factor of its own.
    """

    view: str
    subspaces: int = 1

    pattern = re.compile(f"(linear|channel|spatial|vertical)(?: in {NUMBER})?")

    def to_text(self) -> str:
        return self.view if self.subspaces == 1 else f"{self.view} in {self.subspaces}"

    @classmethod
    def matched(cls, parts: tuple[str | None, ...]) -> "PlainForm":
        return cls(str(parts[0]), int(parts[1] or 1))

    def layer_for(self, dense: nn.Module, rank: int) -> FactoredLayer:
        layer = DenseLayer.of(dense)
        if self.view not in layer.views:
            raise self.refuse(dense)
        if layer.inputs % self.subspaces:
            raise UserError(
                f"the {layer.inputs} inputs of {with_article(dense)} cannot be split into {self.subspaces} subspaces"
            )
        self.require(rank, min(layer.sides(self.view, self.subspaces)))
        if isinstance(dense, nn.Conv2d):
            return FactoredConv2d.shaped_like(dense, rank, self.view, self.subspaces)
        return FactoredLinear.shaped_like(dense, rank, self.subspaces)


@dataclass(frozen=True)
class PivotedForm(Form):
    """Rows of the weight, read as a matrix in one ``view``, and the coefficients of its other rows in them."""

    view: str

    pattern = re.compile("pivoted (linear|channel|spatial)")

    def to_text(self) -> str:
        return f"pivoted {self.view}"

    @classmethod
    def matched(cls, parts: tuple[str | None, ...]) -> "PivotedForm":
        return cls(str(parts[0]))

    def layer_for(self, dense: nn.Module, rank: int) -> FactoredLayer:
        layer = DenseLayer.of(dense)
        if self.view not in layer.views:
            raise self.refuse(dense)
        self.require(rank, linalg.most_pivots(*layer.sides(self.view)))
        return pivoted_like(PlainForm(self.view).layer_for(dense, rank), rank)


@dataclass(frozen=True)
class EmbeddingForm(Form):
    """Two factors of the rows of an embedding, except ``whole_rows`` rows that stay as they are.

    ``pivoted``: the embedding has some of the features as pivots, and the coefficients of the other features in them.
    """

    whole_rows: int = 0
    pivoted: bool = False

    pattern = re.compile(f"(pivoted )?embedding(?: but {NUMBER})?")

    def to_text(self) -> str:
        text = f"embedding but {self.whole_rows}" if self.whole_rows else "embedding"
        return f"pivoted {text}" if self.pivoted else text

    @classmethod
    def matched(cls, parts: tuple[str | None, ...]) -> "EmbeddingForm":
        return cls(int(parts[1] or 0), bool(parts[0]))

    def layer_for(self, dense: nn.Module, rank: int) -> FactoredLayer:
        if not isinstance(dense, nn.Embedding):
            raise self.refuse(dense)
        others = dense.num_embeddings - self.whole_rows
        if others < 1:
            raise UserError(f"of {dense.num_embeddings} rows {self.whole_rows} stay whole, which leaves none to factor")
        sides = dense.embedding_dim, others
        self.require(rank, linalg.most_pivots(*sides) if self.pivoted else min(sides))
        layer = FactoredEmbedding.shaped_like(dense, rank, self.whole_rows)
        return pivoted_like(layer, rank) if self.pivoted else layer


@dataclass(frozen=True)
class TuckerForm(Form):
    """Tucker-2 of a convolution with these ranks of its ``outputs`` and ``inputs`` in each group.

    The rank beside it in a plan counts the directions of both sides together.
    """

    outputs: int
    inputs: int

    pattern = re.compile(f"tucker {NUMBER}x{NUMBER}")

    def to_text(self) -> str:
        return f"tucker {self.outputs}x{self.inputs}"

    @classmethod
    def matched(cls, parts: tuple[str | None, ...]) -> "TuckerForm":
        outputs, inputs = (int(str(part)) for part in parts)
        return cls(outputs, inputs)

    def layer_for(self, dense: nn.Module, rank: int) -> FactoredLayer:
        if not isinstance(dense, nn.Conv2d):
            raise self.refuse(dense)
        self.require(self.outputs, dense.out_channels // dense.groups)
        self.require(self.inputs, dense.in_channels // dense.groups)
        return TuckerConv2d.shaped_like(dense, self.outputs, self.inputs)


FORMS: tuple[type[Form], ...] = (PlainForm, PivotedForm, EmbeddingForm, TuckerForm)
