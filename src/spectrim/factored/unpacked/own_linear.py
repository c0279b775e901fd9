"""Subclasses of Linear that compute the same product in a forward of their own, as FalconLinear does."""

from typing import Any

import torch
from torch import Tensor, nn

from spectrim.factored.unpacked.base import Unpacked, linear

INPUTS, OUTPUTS = 5, 3  # of the small layer on which a forward is tried
SHAPES = ((INPUTS,), (2, INPUTS), (2, 4, INPUTS))
ON: Any = {"device": "cpu", "dtype": torch.float32}
PRECISION = 1e-5  # relative; a forward in half precision is another function


class UnpackedOwnLinear(Unpacked):
    """A subclass of Linear that only writes the product in its own way, with a plain layer inside, ``linear``.

    Nothing else of a call may differ from that of Linear. ``computes_the_product`` tells whether a module is one.
    """

    packs = ("weight", "bias")

    @classmethod
    def layers_of(cls, module: Any) -> dict[str, nn.Module]:
        return {"linear": linear(module.weight, module.bias)}

    def packed(self, name: str) -> Tensor | None:
        return getattr(self.linear, name)

    def forward(self, input: Tensor) -> Tensor:
        return self.linear(input)


def computes_the_product(module: nn.Module) -> bool:
    """Return whether ``module`` is of a subclass of Linear whose own forward computes what that of Linear does.

    It holds nothing but a weight and a bias. Its forward is tried in both modes on a small layer of the same class with
    random numbers, so it costs nothing and ``module`` is not touched. The small layer has the plain attributes of
    ``module``. A forward that needs another one, such as the state of a quantised layer, fails and is none of these.
    """
    kind: Any = type(module)
    if not isinstance(module, nn.Linear) or kind.forward is nn.Linear.forward or "forward" in vars(module):
        return False
    if module._parameters.keys() != {"weight", "bias"} or module._buffers or module._modules:
        return False
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        plain, own = (nn.Linear(INPUTS, OUTPUTS, module.bias is not None, **ON) for _ in range(2))
        own.load_state_dict(plain.state_dict())
        added = vars(module).keys() - vars(own).keys()
        vars(own).update(
            {name: vars(module)[name] for name in added if isinstance(vars(module)[name], str | int | float)}
        )
        own.__class__ = kind
        tries = [(training, torch.randn(shape, **ON)) for training in (True, False) for shape in SHAPES]
        try:
            return all(_agree(own.train(training)(x), plain(x)) for training, x in tries)
        except Exception:  # whatever its forward needs that a small layer on the processor has not
            return False


def _agree(found: object, expected: Tensor) -> bool:
    if not isinstance(found, Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    return torch.allclose(found, expected, PRECISION, PRECISION)
