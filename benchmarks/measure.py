"""Shared code of the benchmarks: clocks, targets, images of noise, and models of the configuration."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import nn

from spectrim.data.images import ImageSplit
from spectrim.report.table import Table
from spectrim.runs import configuration, targets


@dataclass(frozen=True)
class Target:
    """A bound that a measured ratio should keep. ``digits`` and ``unit``: of the printed numbers."""

    what: str
    measured: float
    bound: float
    at_least: bool
    unit: str = "times"
    digits: int = 2

    @property
    def met(self) -> bool:
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def line(self) -> str:
        """Return the target as one line, which says whether it is met or missed."""
        verdict, side = "met" if self.met else "MISSED", "at least" if self.at_least else "at most"
        measured, bound = f"{self.measured:.{self.digits}f}", f"{self.bound:g}"
        return f"Target {verdict}: {self.what}: {measured} {self.unit}, {side} {bound} wanted."


@dataclass(frozen=True)
class Outcome:
    """The result of one benchmark. ``data``: digest or description of its data; ``settings``: sizes and repeats."""

    table: Table
    targets: Sequence[Target]
    settings: Mapping[str, Any]
    data: str


def seconds(work: Callable[[], object]) -> float:
    """Return the wall-clock seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@contextmanager
def clocked(owner: Any, name: str) -> Iterator[list[float]]:
    """Yield the seconds of every call of ``owner.name`` inside the block. It is a method or a function of a module."""
    original, times = getattr(owner, name), list[float]()

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            times.append(time.perf_counter() - started)

    setattr(owner, name, timed)
    try:
        yield times
    finally:
        setattr(owner, name, original)


def noise_images(count: int, batch_size: int) -> ImageSplit:
    """Return 3x32x32 images of noise in ten classes, since the time of a pass does not depend on the pictures."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (count,), generator=generator)
    return ImageSplit(images, labels, (0.5,) * 3, (0.25,) * 3, batch_size, "noise")


def composed(*overrides: str) -> Any:
    """Return the configuration of a run with ``overrides``, as on the command line."""
    with initialize_config_dir(configuration.CONF, version_base="1.3"):
        return compose("config", list(overrides))


def untrained(model: str) -> nn.Module:
    """Return the network of ``conf/model/MODEL.yaml`` for CIFAR-10, with random weights, channels last as in a run."""
    settings = configuration.plain(composed(f"model={model}", "data=cifar10").model)
    torch.manual_seed(0)
    return targets.build(settings).eval().to(memory_format=torch.channels_last)
