"""Layers that share one weight with an embedding, as the head of most decoders does, and then share its factors."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spectrim.factored.base import FactoredLayer
from spectrim.factored.completion import LinearCompletion, Transposed, TransposedCompletion
from spectrim.factored.layers import FactoredEmbedding
from spectrim.factored.unpacked.base import linear


class TiedLinear(FactoredLayer):
    """``x -> (x B) A^T + b``: a linear layer with the weight ``A B^T`` of a factored embedding.

    ``first`` holds the parameter B of the embedding's second factor, and ``second`` the rows A of its first one. They
    are the same objects, so that a step of an optimizer moves both layers. Rows that the embedding keeps whole are
    shared as well.
    """

    def __init__(self, embedding: FactoredEmbedding, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.rank, self.whole_rows = embedding.rank, embedding.whole_rows
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        second = embedding.second
        self.first = TransposedCompletion(second) if isinstance(second, LinearCompletion) else Transposed(second)
        self.second: nn.Linear = linear(embedding.first.weight)
        self._parameters["bias"] = bias  # the base has a property of this name
        if self.whole_rows:
            self.whole = linear(embedding.whole.weight)
            self.place: Tensor
            self.register_buffer("place", embedding.place.clone())

    @property
    def bias(self) -> Tensor | None:
        """The bias of the dense layer, as the same parameter."""
        return self._parameters["bias"]

    @property
    def pivoted(self) -> bool:
        return isinstance(self.first, TransposedCompletion)

    def product_of_plain(self, weights: Sequence[Tensor]) -> Tensor:
        B, A = weights
        return (A @ B.t()).unsqueeze(0)

    @property
    def weight(self) -> Tensor:
        A = self.second.weight
        rows = A @ self.first(torch.eye(self.in_features, dtype=A.dtype, device=A.device)).t()
        return torch.cat([self.whole.weight, rows])[self.place] if self.whole_rows else rows

    def forward(self, input: Tensor) -> Tensor:  # the argument is named as in the dense layer
        outputs = self.second(self.first(input))
        if self.whole_rows:
            outputs = torch.cat([self.whole(input), outputs], -1).index_select(-1, self.place)
        return outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)


def counterpart(layer: nn.Module, other: nn.Module) -> nn.Module:
    """Return the layer that stands in for ``other``, which shares its weight with an embedding.

    ``layer``: what takes the place of that embedding: a factored or a dense one, or its two factors as plain layers.
    ``other``: the layer that is there now, dense or factored.
    """
    if isinstance(layer, FactoredEmbedding):
        if isinstance(other, nn.Linear | TiedLinear):
            own: FactoredLayer = TiedLinear(layer, other._parameters["bias"])
        else:  # the same parameters in modules of its own
            own = copy.deepcopy(layer, {id(one): one for one in (*layer.parameters(), layer._adopted)})
        own.adopt(other)
        return own
    bias = other._parameters.get("bias")
    if isinstance(layer, nn.Embedding):
        if isinstance(other, FactoredLayer):
            return other.dense_with(layer.get_parameter("weight"), bias)
        assert other._parameters["weight"] is layer.weight
        return other
    if not isinstance(other, TiedLinear):
        return layer
    A, B = (part.get_parameter("weight") for part in layer.children())
    return nn.Sequential(linear(B.t().contiguous()), linear(A, bias))
