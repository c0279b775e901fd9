"""Share a split between the processes of torch.distributed, and add up what each of them measures.

Every process calls ``spectrim.compress`` with the same model and arguments, and with its own part of the batches as
``Distributed(batches)``. Sums are added up, and rows are gathered in the order of the ranks. So every process has the
numbers of the whole split and selects the same.
"""

import hashlib
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from spectrim.errors import UserError


class Distributed:
    """The part of a split that this process holds. The processes of ``group`` hold the others.

    ``batches``: as for a whole split.
    ``group``: processes of torch.distributed; all by default.

    Raises ``UserError`` where ``torch.distributed.init_process_group`` has not been called.
    """

    def __init__(self, batches: Iterable[Any], group: Any = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise UserError("Distributed needs a process group; call torch.distributed.init_process_group first")
        self.batches, self.group = batches, group

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


@dataclass(frozen=True)
class Processes:
    """The processes that share a split. ``size``: their number. ``rank``: that of this process among them."""

    group: Any = None
    size: int = 1
    rank: int = 0

    @classmethod
    def that_share(cls, split: Any) -> "Processes":
        """Return the processes that share a split, or this one alone."""
        if not isinstance(split, Distributed):
            return ALONE
        return cls(split.group, dist.get_world_size(split.group), dist.get_rank(split.group))

    def share(self, samples: float) -> float:
        """Return how many of ``samples`` one process reads."""
        return samples / self.size

    def add_up(self, values: Tensor) -> Tensor:
        """Return the sum of ``values`` over the processes; they have one shape in all of them."""
        if self.size == 1:
            return values
        total = values.detach().to(self._device(), copy=True).contiguous()
        dist.all_reduce(total, group=self.group)
        return total.to(values.device)

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes, in the order of their ranks. Their numbers of rows may differ."""
        if self.size == 1:
            return rows
        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = len(rows)
        counts = self.add_up(counts)
        padded = rows.new_zeros(int(counts.max()), *rows.shape[1:], device=self._device())
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)]).to(rows.device)

    def before(self, rows: Tensor) -> Tensor:
        """Return the rows that processes of lower ranks hold. Their numbers of rows may differ."""
        ranks = torch.full((len(rows),), self.rank, device=rows.device)
        return self.gather(rows)[self.gather(ranks) < self.rank]

    def in_any(self, found: Container[str], names: Iterable[str]) -> list[str]:
        """Return those of ``names``, which are the same in all processes, that lie in ``found`` of any of them."""
        names = list(names)
        counts = self.add_up(torch.tensor([int(name in found) for name in names])).tolist()
        return [name for name, count in zip(names, counts, strict=True) if count]

    def require_same(self, text: str, what: str) -> None:
        """Raise ``UserError`` in every process where ``text`` is not the same in all of them."""
        own = torch.tensor(list(hashlib.sha256(text.encode()).digest()), dtype=torch.int64)
        if not torch.equal(self.add_up(own), own * self.size):
            raise UserError(f"the processes have {what} that differ; give each the same model, arguments and machine")

    def _device(self) -> torch.device:
        """Return the device on which the processes exchange tensors."""
        on_gpu = dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


ALONE = Processes()
