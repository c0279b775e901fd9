"""Every algorithm of ``conf/algorithm`` cuts a model in 16 bits, and multiplies nothing of its own in them."""

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import spectrim
from spectrim.decomposers.svd import SVD
from spectrim.errors import UserError
from spectrim.runs import configuration, targets
from spectrim.statistics.objective import Objective
from spectrim.tools.precision import HALVES

ELSEWHERE = {"aimet", "probe", "bound_probe"}  # they run elsewhere, or compress nothing
NAMES = sorted({path.stem for path in (Path(configuration.CONF) / "algorithm").glob("*.yaml")} - ELSEWHERE)
PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm, torch.ops.aten.mv}
PRODUCTS |= {torch.ops.aten.convolution, torch.ops.aten.dot, torch.ops.aten.linalg_vector_norm}
OURS = str(Path(spectrim.__file__).parent)
OF_MODELS = {"batches.py", "factored", "models", "losses.py", "surgery", "training"}


class Watch(TorchDispatchMode):
    """Gather the places of our own products in 16 bits: not those of a model, nor of a way back through it."""

    def __init__(self) -> None:
        super().__init__()
        self.found = set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [own for own in args if isinstance(own, torch.Tensor)]
        coarse = func.overloadpacket in PRODUCTS and any(own.dtype in HALVES for own in tensors)
        if coarse and torch._C._current_graph_task_id() == -1 and (place := _place(sys._getframe(1))):
            self.found.add(place)
        return func(*args, **(kwargs or {}))


def _place(frame: FrameType | None) -> str:
    """Return the innermost line of spectrim; empty where it is one of a model."""
    while frame is not None and not frame.f_code.co_filename.startswith(OURS):
        frame = frame.f_back
    if frame is None:
        return ""
    part = Path(frame.f_code.co_filename).relative_to(OURS)
    return "" if part.parts[0] in OF_MODELS else f"{part}:{frame.f_lineno}"


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_is_right_or_refused(
    compose: Any, brief: Any, net: nn.Sequential, objective: Objective, name: str
) -> None:
    dtype, algorithm = torch.bfloat16, brief(targets.build(configuration.plain(compose(f"algorithm={name}").algorithm)))
    halves = {
        split: [(inputs.to(dtype), answers) for inputs, answers in batches]
        for split, batches in objective.splits.items()
    }
    with Watch() as watch:
        try:
            result = algorithm.compress(net.to(dtype), getattr(algorithm, "decomposer", SVD()), objective.on(halves))
        except UserError as error:
            assert "\n" not in str(error) and "16 bit" in str(error)
            return
        finally:
            assert not watch.found
    assert {own.dtype for own in result.model.parameters()} == {dtype}
    assert all(own.isfinite().all() for own in result.model.parameters())
