"""The dense layers that can be factored, and what all of them offer whatever their class."""

import sys
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from spectrim.errors import UserError
from spectrim.tools.content import TORCH_OWN


def transposed_kinds() -> tuple[type[nn.Module], ...]:
    """Return the classes of linear layers that store their weight as (inputs, outputs): transformers' Conv1D.

    Without transformers imported there are none, because no model can hold one.
    """
    module = sys.modules.get("transformers.pytorch_utils")
    return () if module is None else (module.Conv1D,)


def dense_kinds() -> tuple[type[nn.Module], ...]:
    """Return the classes of layers that can be factored."""
    return nn.Linear, nn.Conv2d, nn.Embedding, *transposed_kinds()


@dataclass(frozen=True, eq=False)
class DenseLayer:
    """A layer that can be factored: a Linear, Conv2d, Embedding, or transformers' Conv1D, which GPT-2 uses.

    An embedding is read as a linear layer whose inputs are its ids: one of them is 1, all others are 0.

    ``module``: the layer itself.
    ``views``: the names of the ways in which its weight can be read as a matrix.
    ``weight``: (outputs, inputs, kh, kw) of a convolution, otherwise (outputs, inputs), or (inputs, outputs) where it
        is ``stored_transposed``.
    ``outputs``: number of outputs of all groups. ``inputs``: number of inputs of one group.
    """

    module: nn.Module
    views: tuple[str, ...]
    weight: Tensor
    bias: Tensor | None
    outputs: int
    inputs: int
    groups: int = 1
    kernel: tuple[int, int] = (1, 1)
    stored_transposed: bool = False

    @classmethod
    def of(cls, module: nn.Module) -> "DenseLayer":
        """Describe ``module``. Raises ``UserError`` for another kind of layer and for complex or integer weights."""
        if isinstance(module, nn.Conv2d):
            outputs, inputs, kh, kw = module.weight.shape
            views = ("channel", "spatial", "vertical")
            layer = cls(module, views, module.weight, module.bias, outputs, inputs, module.groups, (kh, kw))
        elif isinstance(module, nn.Linear):
            layer = cls(module, ("linear",), module.weight, module.bias, *module.weight.shape)
        elif isinstance(module, nn.Embedding):
            inputs, outputs = module.weight.shape
            layer = cls(module, ("embedding",), module.weight, None, outputs, inputs, stored_transposed=True)
        elif isinstance(module, transposed_kinds()):
            weight, bias = module.get_parameter("weight"), module.get_parameter("bias")
            inputs, outputs = weight.shape
            layer = cls(module, ("linear",), weight, bias, outputs, inputs, stored_transposed=True)
        else:
            raise UserError(
                f"only {', '.join(kind.__name__ for kind in dense_kinds())} can be factored, not {with_article(module)}"
            )
        if not layer.weight.is_floating_point():
            raise UserError(
                f"{with_article(module)} with weights of {layer.weight.dtype} cannot be factored; leave it dense"
            )
        return layer

    def view(self, wanted: str) -> str:
        """Return the view ``wanted`` of a convolution, or the only view of another layer."""
        return wanted if wanted in self.views else self.views[0]

    def sides(self, view: str, subspaces: int = 1) -> tuple[int, int]:
        """Return the rows and columns of one matrix: one for each group and each of the ``subspaces`` of its inputs."""
        (kh, kw), rows, columns = self.kernel, self.outputs // self.groups, self.inputs // subspaces
        if view == "spatial":
            return rows * kh, columns * kw
        if view == "vertical":
            return rows * kw, columns * kh
        return rows, columns * kh * kw

    def without_weights(self) -> "DenseLayer":
        """Return a layer with the same shapes and settings on the meta device.

        It has the class of torch and only attributes that are plain values, so that it keeps no model alive.
        """
        kind = next(kind for kind in dense_kinds() if isinstance(self.module, kind))
        module = kind.__new__(kind)
        nn.Module.__init__(module)
        plain = str | int | float | tuple | list | None
        vars(module).update({k: v for k, v in attributes_of(self.module).items() if isinstance(v, plain)})
        module.register_parameter("weight", nn.Parameter(self.weight.detach().to("meta")))
        if not isinstance(module, nn.Embedding):
            bias = None if self.bias is None else nn.Parameter(self.bias.detach().to("meta"))
            module.register_parameter("bias", bias)
        return DenseLayer.of(module)


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that the class of ``module`` adds to those of every module of torch."""
    return {name: value for name, value in vars(module).items() if name not in TORCH_OWN}


def with_article(value: object) -> str:
    """Return the name of the class of ``value``, for a message."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
