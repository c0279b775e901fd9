"""The base of modules that hold each of their matrices as a layer."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Unpacked(nn.Module):
    """A module that computes what a module of another class does, with each matrix in a layer of its own.

    Torch packs several matrices into the parameters of one module: ``in_proj_weight`` of attention, ``weight_hh_l0`` of
    an LSTM, the experts of a mixture in one tensor. ``unpack`` turns such a module, in place, into a subclass of this
    one, whose matrices are layers that can be factored. ``pack`` turns it back. The module keeps its place, its
    attributes and its hooks, and offers the packed parameters by their names, computed at each access.

    ``kinds``: the classes that the subclass can unpack. ``packs``: the names of the parameters that become layers.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]] = ()
    packs: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Return why ``module``, of one of ``kinds``, cannot be unpacked; None where it can."""
        return None

    @classmethod
    def packed_names(cls, module: nn.Module) -> tuple[str, ...]:
        """Return the names of the parameters of ``module`` that become layers."""
        return cls.packs

    @classmethod
    def layers_of(cls, module: Any) -> dict[str, nn.Module]:
        """Return the layers that replace the packed parameters of ``module``, by name."""
        return {}

    def packed(self, name: str) -> Tensor | None:
        """Return the packed parameter ``name``, computed from the layers."""
        raise NotImplementedError

    @classmethod
    def unpack(cls, module: nn.Module) -> None:
        """Turn ``module`` into one of this class, in place. The layers share the memory of its parameters if they can.

        Layers that it holds already, such as the output projection of attention, stay.
        """
        layers, names, order = cls.layers_of(module), cls.packed_names(module), tuple(module._parameters)
        for name in names:
            del module._parameters[name]
        own = {"_packed_class": type(module), "_packed_names": names, "_order": order, "_layer_names": tuple(layers)}
        vars(module).update(own)
        module.__class__ = cls
        for name, layer in layers.items():
            setattr(module, name, layer)
            layer.train(module.training)

    def pack(self) -> None:
        """Turn this module back into the class that it had, in place, with the weights of its layers."""
        own: dict[str, Any] = vars(self)
        with torch.enable_grad():  # tells which of them require a gradient
            values = {name: self.packed(name) for name in own["_packed_names"]}
        for name in own["_layer_names"]:
            delattr(self, name)
        self.__class__, order = own.pop("_packed_class"), own.pop("_order")
        for name in ("_packed_names", "_layer_names"):
            del own[name]
        for name, value in values.items():
            self.register_parameter(name, None if value is None else _parameter(value))
        own["_parameters"] = {name: own["_parameters"][name] for name in order}

    def __getattr__(self, name: str) -> Any:
        if name in vars(self).get("_packed_names", ()):
            return self.packed(name)
        return super().__getattr__(name)


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Return a linear layer with this weight (outputs, inputs) and bias, in the same memory."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    return with_parameters(layer, weight, bias)


def with_parameters(layer: Any, weight: Tensor, bias: Tensor | None) -> Any:
    """Return ``layer`` with this weight and bias. A tensor that is no parameter becomes one."""
    layer.weight = _parameter(weight)
    if bias is not None:
        layer.bias = _parameter(bias)
    return layer


def _parameter(value: Tensor) -> nn.Parameter:
    return value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach(), value.requires_grad)
