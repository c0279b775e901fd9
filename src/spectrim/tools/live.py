"""Progress bars that also tell a listener how far they are, so that a run can be followed from another machine."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

# Takes the name of a bar, what is done, the total if it is known, and numbers such as the loss of an epoch.
Listener = Callable[[str, float, float | None, Mapping[str, float]], None]
_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Tell ``listener`` of every bar that runs inside the block, in the thread of the block."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


class Bar(tqdm):
    """A bar of tqdm that is shown on a terminal only, and that tells the listener of its block at each step."""

    def __init__(self, iterable: Any = None, desc: str | None = None, total: float | None = None, **more: Any) -> None:
        super().__init__(iterable, desc, total, **{"disable": None, **more})
        self._name = desc  # tqdm forgets it in a bar that is not shown
        self._numbers: dict[str, float] = {}

    def __iter__(self) -> Iterator[Any]:
        try:
            for item in self.iterable:
                yield item
                self.update()
        finally:
            self.close()

    def tell(self, numbers: Mapping[str, Any]) -> None:
        """Let the next step of the bar tell the numbers in ``numbers``, too. Other values are left out."""
        self._numbers = {key: float(value) for key, value in numbers.items() if isinstance(value, int | float)}

    def update(self, n: float | None = 1) -> bool | None:
        """Advance the bar by ``n``."""
        shown = super().update(n)
        if self.disable:  # tqdm does not count then
            self.n += n or 0
        listener = _LISTENER.get()
        if listener and self._name:
            listener(self._name, self.n, self.total, self._numbers)
        self._numbers = {}
        return shown
