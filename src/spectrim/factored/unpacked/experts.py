"""The experts of a mixture, which transformers holds in one tensor for all of them, as layers."""

from typing import Any

import torch
from torch import Tensor, nn

from spectrim.factored.unpacked.base import Unpacked, linear

ROWS = 5  # of the trial that tells whether a class of experts computes what this one does
TOLERANCE = 1e-2  # of the norm of its outputs: between rounding in 16 bits and another formula


class UnpackedExperts(Unpacked):
    """Gated experts ``down(act(gate(x)) * up(x))``, as in Mixtral and Qwen-MoE, with two layers an expert.

    ``gate_up.E`` holds the rows of gate and up of expert E, ``down.E`` its output matrix.
    """

    packs = ("gate_up_proj", "down_proj")

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        """Return why experts cannot be unpacked. A trial on a few random rows shows whether they compute the same."""
        own = {name: value for name, value in module._parameters.items() if value is not None}
        if own.keys() != set(cls.packs) or not callable(getattr(module, "act_fn", None)):
            return "its experts are not gate, up and down alone"
        gate_up, down = own["gate_up_proj"], own["down_proj"]
        experts, outputs, inputs = down.shape
        if gate_up.shape != (experts, 2 * inputs, outputs):
            return "its experts are stored in another order"
        if down.is_meta:
            return None
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(ROWS, outputs, generator=generator).to(down)
        chosen = (torch.arange(2 * ROWS).reshape(ROWS, 2) % experts).to(down.device)
        weights = torch.rand(ROWS, 2, generator=generator).to(down)
        try:
            with torch.no_grad():
                theirs = module(rows, chosen, weights)
                ours = _mixed(rows, chosen, weights, module.act_fn, list(gate_up), list(down))
        except Exception:  # whatever a foreign module raises
            return "its experts are called in another way"
        same = theirs.shape == ours.shape and (theirs - ours).norm() <= TOLERANCE * theirs.norm()
        return None if same else "its experts compute another formula"

    @classmethod
    def layers_of(cls, module: Any) -> dict[str, nn.Module]:
        stacks = {"gate_up": module.gate_up_proj, "down": module.down_proj}
        return {name: nn.ModuleList(linear(one) for one in stack) for name, stack in stacks.items()}

    def packed(self, name: str) -> Tensor | None:
        own: Any = self
        return torch.stack([layer.weight for layer in getattr(own, name.removesuffix("_proj"))])

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the sum of the experts of each row, weighted.

        ``hidden_states``: (rows, features). ``top_k_index``, ``top_k_weights``: the experts of each row, (rows, k).
        """
        own: Any = self
        return _mixed(hidden_states, top_k_index, top_k_weights, own.act_fn, own.gate_up, own.down)


def _mixed(x: Tensor, chosen: Tensor, weights: Tensor, act: Any, gate_up: Any, down: Any) -> Tensor:
    """Return the outputs of experts, whose layers are called, or whose matrices (outputs, inputs) are multiplied by."""
    mixed, count = torch.zeros_like(x), len(down)
    # A graph cannot depend on which experts are hit. Without one, an expert that is not hit is not called.
    hit = range(count) if torch.compiler.is_compiling() else [e for e in chosen.unique().tolist() if e < count]
    for expert in hit:
        rows, place = torch.where(chosen == expert)
        gate, up = _apply(gate_up[expert], x[rows]).chunk(2, -1)
        y = _apply(down[expert], act(gate) * up) * weights[rows, place, None]
        mixed = mixed.index_add(0, rows, y.to(mixed.dtype))
    return mixed


def _apply(layer: Any, x: Tensor) -> Tensor:
    return x @ layer.t() if isinstance(layer, Tensor) else layer(x)
