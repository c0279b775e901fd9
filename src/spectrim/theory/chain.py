"""Read a model as the chain of layers to which the theorems of S2 apply."""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from spectrim.batches import Inputs, device_of, evaluating
from spectrim.decomposers.matrix import MatrixSpectrum
from spectrim.decomposers.spectrum import Decomposer, spectrum_of
from spectrim.decomposers.svd import SVD
from spectrim.errors import UserError, first_line
from spectrim.theory.bounds import Stage
from spectrim.theory.lipschitz import convolution_gain, lipschitz

# Functions that a model may call, and the module with the same arguments.
_FUNCTIONS: dict[Any, type[nn.Module]] = {
    F.relu: nn.ReLU,
    torch.relu: nn.ReLU,
    F.leaky_relu: nn.LeakyReLU,
    F.elu: nn.ELU,
    F.gelu: nn.GELU,
    F.silu: nn.SiLU,
    torch.tanh: nn.Tanh,
    F.max_pool2d: nn.MaxPool2d,
    F.avg_pool2d: nn.AvgPool2d,
    torch.flatten: nn.Flatten,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "flatten": nn.Flatten,
}
NEEDED = "the bounds need a chain of Linear, Conv2d and known activations"


class Chain(NamedTuple):
    """Hold the stages of a network in their order, and the Lipschitz constant ``lead`` of what precedes the first."""

    stages: tuple[Stage, ...]
    lead: float

    def input_norm(self, batches: Iterable[tuple[Inputs, Any]]) -> float:
        """Return a bound on the 2-norm of the inputs of the first stage, over all samples (B of S2).

        Raises ``UserError`` for an empty split.
        """
        norms = [inputs.double().flatten(1).norm(dim=1).max().item() for inputs, _ in batches]
        if not norms:
            raise UserError("the split is empty; give at least one batch of (inputs, targets)")
        return self.lead * max(norms)


def chain_of(model: nn.Module, decomposer: Decomposer, example: Inputs) -> Chain:
    """Read ``model`` as a chain.

    ``example``: one batch of inputs.
    Raises ``UserError`` where the model branches, where it calls a function without a known constant, or where an
    activation does not map 0 to 0. Another decomposer than ``SVD`` is refused, because ``sigma_{k+1}`` is the norm of
    the dropped part only for the SVD.
    """
    if not isinstance(decomposer, SVD):
        raise UserError(f"the bounds hold for the plain SVD, not for {type(decomposer).__name__}")
    if not isinstance(example, Tensor):
        raise UserError(f"{NEEDED}; this model takes more than one tensor")
    x = given = example[:1].to(device_of(model))
    stages: list[Stage] = []
    lead = 1.0
    with evaluating(model), torch.no_grad():
        for name, module in _steps(model):
            y = module(x.clone())  # Some activations write to their input.
            if type(module) in (nn.Linear, nn.Conv2d):
                stages.append(_stage(name, module, decomposer, y))
            elif stages:
                stages[-1] = stages[-1]._replace(rho=stages[-1].rho * _rho(module, x))
            else:
                lead *= _rho(module, x)
            x = y
        if not torch.allclose(x, model(given.clone())):
            raise UserError(f"{NEEDED}; this model does more than call them in turn")
    if not stages:
        raise UserError(f"{NEEDED}; this model has no Linear or Conv2d")
    return Chain(tuple(stages), lead)


def _rho(module: nn.Module, x: Tensor) -> float:
    rho = lipschitz(module)
    if module(torch.zeros_like(x)).any():
        raise UserError(f"{type(module).__name__} does not map 0 to 0, which Theorem 1 asks of every activation")
    return rho


def _stage(name: str, layer: Any, decomposer: SVD, output: Tensor) -> Stage:
    spectrum = spectrum_of(layer, decomposer)
    assert isinstance(spectrum, MatrixSpectrum)
    gain = convolution_gain(layer, decomposer.view) if isinstance(layer, nn.Conv2d) else 1.0
    bias = 0.0
    if layer.bias is not None:
        positions = output.numel() // layer.bias.numel()  # the bias is added to each of them
        bias = math.sqrt(positions) * float(layer.bias.detach().double().norm())
    # Groups are the blocks of one matrix, so its norm is that of the worst block. The same holds for the dropped part.
    return Stage(name, gain * spectrum.S_R.amax(0).double().cpu(), 1.0, bias)


def _steps(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that ``model`` calls one after the other, each on the output of the one before."""
    before: fx.Node | None = None
    for node in _graph(model).nodes:
        if node.op == "placeholder" and before is None:
            before = node
            continue
        if node.all_input_nodes != [before] or (node.op == "output" and node.args != (before,)):
            raise UserError(f"{NEEDED}; this model branches at {node.name}")
        if node.op == "call_module":
            yield str(node.target), model.get_submodule(str(node.target))
        elif node.op != "output":
            yield node.name, _as_module(node)
        before = node


def _graph(model: nn.Module) -> fx.Graph:
    try:
        return fx.Tracer().trace(model)
    except Exception as error:  # The code of the model runs on placeholders for tensors and may fail in any way.
        raise UserError(f"{NEEDED}; this model cannot be read as one: {first_line(error)}") from error


def _as_module(node: fx.Node) -> nn.Module:
    if node.target not in _FUNCTIONS:
        raise UserError(f"{NEEDED}; no Lipschitz constant is known for {node.name}")
    return _FUNCTIONS[node.target](*node.args[1:], **node.kwargs)
