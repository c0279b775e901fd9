"""Find the blocks of a model, and watch what they put out in a pass."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from spectrim.batches import tensors_of
from spectrim.factored.base import FactoredLayer
from spectrim.refit.distance import relative_error
from spectrim.tools.hooks import hooked

CONTAINERS = nn.Sequential, nn.ModuleList, nn.ModuleDict


def repeated_blocks(model: nn.Module, dense: nn.Module) -> list[str]:
    """Return the names of the modules that are repeated and hold a factored layer, the outermost ones.

    A module is repeated if its parent holds another of its class: a residual block of a stage, or a layer of a
    transformer. Stages themselves are no blocks: ``nn.Sequential`` and other containers of torch say nothing of what
    they hold. A block has the same name in ``dense``. The list is empty where a model has none.
    """
    theirs, found = {name for name, _ in dense.named_modules()}, list[str]()
    for name, parent in model.named_modules():
        if isinstance(parent, FactoredLayer) or any(f"{name}.".startswith(f"{outer}.") for outer in found):
            continue
        kinds = Counter(type(child) for child in parent.children())
        for own, child in parent.named_children():
            place = f"{name}.{own}" if name else own
            repeated = kinds[type(child)] > 1 and not isinstance(child, (FactoredLayer, *CONTAINERS))
            holds = any(isinstance(module, FactoredLayer) for module in child.modules())
            if repeated and holds and place in theirs:
                found.append(place)
    return found


@contextmanager
def outputs_of(model: nn.Module, blocks: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Yield a mapping that holds the first floating-point tensor that each block put out last, by name."""
    seen: dict[str, Tensor] = {}

    def called(name: str, _: nn.Module, __: tuple, ___: dict[str, Any], output: Any) -> None:
        tensor = next((own for own in tensors_of(output) if own.is_floating_point()), None)
        if tensor is not None:
            seen[name] = tensor

    with hooked(after=[(model.get_submodule(name), partial(called, name)) for name in blocks]):
        yield seen


def block_error(outputs: dict[str, Tensor], wanted: dict[str, Tensor]) -> Tensor | None:
    """Return the mean of ``||y - y_dense||^2 / ||y_dense||^2`` over the blocks that both models passed; None for none.

    A block whose outputs differ in shape is left out: an expert receives other tokens in either model.
    """
    pairs = [(y, wanted[name]) for name, y in outputs.items() if name in wanted and y.shape == wanted[name].shape]
    return sum(map(relative_error, *zip(*pairs, strict=True))) / len(pairs) if pairs else None  # type: ignore[return-value]
