"""Run one compression for ``memory.py`` in a process of its own, and print its peak of memory as JSON. Linux."""

import json
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spectrim
from spectrim.algorithms.joint import Joint
from spectrim.algorithms.lossless import Lossless
from spectrim.algorithms.shared.compressed import Algorithm
from spectrim.algorithms.truncation import Truncation
from spectrim.decomposers.spectrum import Decomposer
from spectrim.decomposers.svd import SVD
from spectrim.decomposers.whitened import WhitenedSVD
from spectrim.losses import token_loss
from spectrim.tools.profiling import Phases

WHITENED = WhitenedSVD(view="channel", samples=8)
METHODS: dict[str, tuple[Algorithm, Decomposer]] = {
    "truncation": (Truncation(params_kept=0.8), SVD()),
    "truncation, whitened": (Truncation(params_kept=0.8), WHITENED),
    "lossless": (Lossless(gamma=0.3), SVD()),
    "joint": (Joint(params_kept=0.8, samples=8, refit=0), WHITENED),
}


class Block(nn.Module):
    """A block of a decoder: attention with a third as many heads for keys and values, and a gated layer."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.q, self.o = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(width, width // 3, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (3, -1)).transpose(1, 2) for part in (self.q(x), *self._repeated(x)))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y = F.rms_norm(x, x.shape[-1:])
        return x + self.down(F.silu(self.gate(y)) * self.up(y))

    def _repeated(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.k(x).repeat(1, 1, 3), self.v(x).repeat(1, 1, 3)


class Decoder(nn.Module):
    """A decoder that maps token ids (N, T) to logits (N, T, V); its head is the embedding."""

    def __init__(self, depth: int, width: int, inner: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(Block(width, inner) for _ in range(depth)))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.blocks(self.embedding(ids))
        return F.linear(F.rms_norm(x, x.shape[-1:]), self.embedding.weight)


def main() -> None:
    """Run the compression and print its memory."""
    method, (at_once, *shapes) = sys.argv[1], json.loads(sys.argv[2])
    torch.manual_seed(0)
    phases = Phases()
    with phases.measure("load"):
        model, ids = Decoder(*shapes), torch.randint(shapes[-1], (8, 128))
    algorithm, decomposer = METHODS[method]
    with phases.measure("compress"):
        result = spectrim.compress(
            model,
            calibration=[(one, one) for one in ids.split(1)],
            loss=token_loss,
            algorithm=algorithm,
            decomposer=decomposer,
            layers_at_once=at_once,
        )
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 2**20
    load, own = phases["load"], phases["compress"]
    imports = load["peak_mib"] - load["added_mib"]
    found = {
        "loaded": (own["peak_mib"] - own["added_mib"] - imports) / size,
        "peak": (own["peak_mib"] - imports) / size,
        "params_kept": result.params_kept,
        "seconds": own["seconds"],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
