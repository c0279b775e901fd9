"""Choose which parameters of a model take gradients."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def alone_trainable(model: nn.Module, weights: Iterable[Tensor]) -> Iterator[None]:
    """Let only ``weights`` of the parameters of ``model`` require a gradient inside the block.

    A forward pass then does not store the activations that only the gradients of other parameters need.
    """
    wanted = {id(weight) for weight in weights}
    changed = [parameter for parameter in model.parameters() if parameter.requires_grad != (id(parameter) in wanted)]
    for parameter in changed:
        parameter.requires_grad_(not parameter.requires_grad)
    try:
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(not parameter.requires_grad)
