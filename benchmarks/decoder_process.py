"""Run one joint selection for ``decoders.py`` in a process of its own, and print its memory by phase as JSON. Linux."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from decoders import PHASES
from memory_process import Decoder
from torch import nn

import spectrim
from spectrim.algorithms import joint
from spectrim.algorithms.joint import Joint
from spectrim.algorithms.shared import decomposed, workbench
from spectrim.decomposers.two_sided import TwoSidedSVD
from spectrim.losses import token_loss
from spectrim.tools import malloc
from spectrim.tools.profiling import Phases

SEQUENCES, TOKENS = 8, 128
TINY = (1, 48, 96, 200)  # depth, width, inner width, vocabulary


class ByPhase:
    """The highest peak of each phase. One phase ends where the next begins."""

    def __init__(self) -> None:
        self.peaks: dict[str, float] = {}
        self._open: Any = None

    def enter(self, phase: str | None) -> None:
        """End the phase that runs, if any, and begin ``phase``."""
        if self._open is not None:
            name, phases, block = self._open
            block.__exit__(None, None, None)
            self.peaks[name] = max(self.peaks.get(name, 0.0), phases[name]["peak_mib"])
        self._open = None
        if phase is not None:
            phases = Phases()
            block = phases.measure(phase)
            block.__enter__()
            self._open = phase, phases, block

    def around(self, owner: Any, name: str, phase: str, after: str) -> None:
        """Have the calls of function ``name`` of ``owner`` be ``phase``, and what follows them ``after``."""
        inner: Callable[..., Any] = getattr(owner, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            self.enter(phase)
            try:
                return inner(*args, **kwargs)
            finally:
                self.enter(after)

        setattr(owner, name, called)


def main() -> None:
    """Run the compression and print its memory."""
    batch, at_once, *shapes = json.loads(sys.argv[1])
    torch.manual_seed(0)
    _select(TINY, 1, None)  # what is loaded once, and the work space of libraries, belongs to no model
    found, began, phases = ByPhase(), time.perf_counter(), Phases()
    found.around(workbench, "decomposed", "decompose", "build")
    found.around(decomposed, "moments_for", "moments", "decompose")
    found.around(joint, "gates_at", "gates", "build")
    malloc.give_back()
    with phases.measure("before"):
        pass
    found.enter("build")
    model = _select(shapes, batch, at_once)
    found.enter(None)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 2**20
    peaks = {phase: (found.peaks[phase] - phases["before"]["peak_mib"]) / size for phase in PHASES}
    print(json.dumps({**peaks, "peak": max(peaks.values()), "seconds": time.perf_counter() - began}))


def _select(shapes: Sequence[int], batch: int, at_once: int | None) -> nn.Module:
    """Return a decoder of these ``shapes``, once a compression of it is done."""
    model, ids = Decoder(*shapes), torch.randint(shapes[-1], (SEQUENCES, TOKENS))
    result = spectrim.compress(
        model,
        calibration=[(one, one) for one in ids.split(batch)],
        loss=token_loss,
        algorithm=Joint(params_kept=0.8, samples=SEQUENCES, significance=4.0, refit=0),
        decomposer=TwoSidedSVD(view="channel", samples=SEQUENCES, factors="pivoted"),
        layers_at_once=at_once,
    )
    assert result.params_kept <= 0.8
    return model


if __name__ == "__main__":
    main()
