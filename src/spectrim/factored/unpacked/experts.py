"""The experts of a mixture, which transformers holds in one tensor for all of them, as layers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.factored.unpacked.base import Unpacked, linear

ROWS = 5  # of the trial that tells whether a class of experts computes what this one does
TOLERANCE = 1e-2  # of the norm of its outputs: between rounding in 16 bits and another formula
Expert = Callable[[int, Tensor], Tensor]  # the output of one expert's matrix on rows


class UnpackedExperts(Unpacked):
    """Gated experts, as in Mixtral, Qwen-MoE and gpt-oss, with two layers an expert.

    ``gate_up.E`` puts out gate and up of expert E, which the class of the experts combines; ``down.E`` follows.
    """

    packs = ("gate_up_proj", "down_proj")

    @classmethod
    def packed_names(cls, module: nn.Module) -> tuple[str, ...]:
        biases = [f"{name}_bias" for name in cls.packs]
        return (*cls.packs, *(name for name in biases if module._parameters.get(name) is not None))

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        """Return why experts cannot be unpacked. A trial on a few random rows shows whether they compute the same."""
        own = {name for name, value in module._parameters.items() if value is not None}
        if own != set(cls.packed_names(module)):
            return "its experts have other parameters than gate, up and down"
        (experts, first, inputs), (count, outputs, second) = (w.shape for w, _ in _matrices(module).values())
        if (experts, inputs, first) != (count, outputs, 2 * second):
            return "its experts are stored in another order"
        if module.down_proj.is_meta:
            return None
        generator, like = torch.Generator().manual_seed(0), module.down_proj
        rows = torch.randn(ROWS, inputs, generator=generator).to(like)
        chosen = (torch.arange(2 * ROWS).reshape(ROWS, 2) % experts).to(like.device)
        weights = torch.rand(ROWS, 2, generator=generator).to(like)
        apply = [partial(_by_matrix, *own) for own in _matrices(module).values()]
        try:
            with torch.no_grad():
                theirs = type(module).forward(module, rows, chosen, weights)  # hooks are for the user's own inputs
                ours = _mixed(rows, chosen, weights, experts, partial(_gated, type(module), module), *apply)
        except Exception:  # whatever a foreign module raises
            return "its experts are called in another way"
        same = theirs.shape == ours.shape and (theirs - ours).norm() <= TOLERANCE * theirs.norm()
        return None if same else "its experts compute another formula"

    @classmethod
    def layers_of(cls, module: Any) -> dict[str, nn.Module]:
        return {
            name: nn.ModuleList(linear(W.contiguous(), None if b is None else b[e]) for e, W in enumerate(stack))
            for name, (stack, b) in _matrices(module).items()
        }

    def packed(self, name: str) -> Tensor | None:
        own: Any = self
        layers = getattr(own, name.removesuffix("_bias").removesuffix("_proj"))
        if name.endswith("_bias"):
            return torch.stack([layer.bias for layer in layers])
        stack = torch.stack([layer.weight for layer in layers])
        return stack.transpose(1, 2).contiguous() if _transposed(own) else stack

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the sum of the experts of each row, weighted.

        ``hidden_states``: (rows, features). ``top_k_index``, ``top_k_weights``: the experts of each row, (rows, k).
        """
        own: Any = self
        gate = partial(_gated, own._packed_class, own)
        apply = [partial(_by_layer, layers) for layers in (own.gate_up, own.down)]
        return _mixed(hidden_states, top_k_index, top_k_weights, len(own.down), gate, *apply)


def _transposed(module: Any) -> bool:
    return bool(getattr(module, "is_transposed", False))


def _matrices(module: Any) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Return the matrices (experts, outputs, inputs) and biases (experts, outputs) of packed experts."""
    found = {}
    for name in UnpackedExperts.packs:
        stack, bias = module._parameters[name], module._parameters.get(f"{name}_bias")
        found[name.removesuffix("_proj")] = stack.transpose(1, 2) if _transposed(module) else stack, bias
    return found


def _gated(kind: Any, module: Any, gate_up: Tensor) -> Tensor:
    """Return what the experts of class ``kind`` make of gate and up, which lie side by side unless it says how."""
    if hasattr(kind, "_apply_gate"):
        return kind._apply_gate(module, gate_up)
    gate, up = gate_up.chunk(2, -1)
    return module.act_fn(gate) * up


def _mixed(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    count: int,
    gated: Callable[[Tensor], Tensor],
    first: Expert,
    last: Expert,
) -> Tensor:
    mixed = torch.zeros_like(x)
    # A graph cannot depend on which experts are hit. Without one, an expert that is not hit is not called.
    hit = range(count) if torch.compiler.is_compiling() else [e for e in chosen.unique().tolist() if e < count]
    for expert in hit:
        rows, place = torch.where(chosen == expert)
        y = last(expert, gated(first(expert, x[rows]))) * weights[rows, place, None]
        mixed = mixed.index_add(0, rows, y.to(mixed.dtype))
    return mixed


def _by_matrix(stack: Tensor, bias: Tensor | None, expert: int, x: Tensor) -> Tensor:
    return F.linear(x, stack[expert], None if bias is None else bias[expert])


def _by_layer(layers: nn.ModuleList, expert: int, x: Tensor) -> Tensor:
    return layers[expert](x)
