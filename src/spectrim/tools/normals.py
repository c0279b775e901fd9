"""The numbers of one call of ``torch.randn``, a piece at a time, so that not all of them are in memory."""

import torch
from torch import Tensor

TOGETHER = 16  # numbers that torch makes of its generator at once; the last of a call are made anew where some are left


class Normals:
    """The numbers of ``torch.randn(count, generator=generator)`` in float32, in order, bit for bit."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.generator, self._left, self._drawn = generator, count, torch.empty(0)

    def take(self, count: int) -> Tensor:
        """Return the next ``count`` numbers, of which so many must be left."""
        missing = count - len(self._drawn)
        if missing > 0:
            own = -(-missing // TOGETHER) * TOGETHER
            if self._left - own < TOGETHER:  # too few for a call of their own
                own = self._left
            self._left -= own
            drawn = torch.randn(own, generator=self.generator, dtype=torch.float32)
            self._drawn = torch.cat([self._drawn, drawn]) if len(self._drawn) else drawn
        taken, self._drawn = self._drawn[:count], self._drawn[count:]
        return taken
