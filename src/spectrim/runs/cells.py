"""The cells of a committed grid: what each one overrides and the signature of its record."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from hydra import compose
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from spectrim.runs.signing import scientific, signed
from spectrim.tools import digests


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    ``overrides``: the words that Hydra's sweeper gives it.
    ``experiment``: the folder of its record.
    ``signature``: the name of its record; None where its checkpoint is missing.
    ``checkpoint``: the file that it starts from; None where it starts untrained.
    """

    overrides: tuple[str, ...]
    experiment: str
    signature: str | None
    checkpoint: Path | None


def cells(grid: str) -> list[Cell]:
    """Return the cells of a grid in the order in which Hydra runs them.

    It must be called inside ``hydra.initialize_config_dir``.
    Raises ``UserError`` or an error of Hydra where a cell does not compose.
    """
    found = {index: cell(chosen, cfg) for index, chosen, cfg in configurations(grid)}
    return [found[index] for index in sorted(found)]


def configurations(grid: str) -> Iterator[tuple[int, tuple[str, ...], DictConfig]]:
    """Yield index, overrides and configuration of each cell. A configuration holds until the next one is asked for.

    Hydra composes once for each choice of options, such as ``algorithm=joint``. Plain values are then set as Hydra sets
    them, which takes a hundredth of the time of a composition.
    """
    whole = _composed(grid, ())
    params = whole.hydra.sweeper.get("params") or {}
    swept = _parsed(tuple(f"{key}={values}" for key, values in params.items()))
    by_options: dict[tuple[str, ...], list[tuple[int, tuple[str, ...]]]] = {}
    for index, chosen in enumerate(product(*(choices(one) for one in swept))):
        options = tuple(word for word in chosen if _needs_composition(word, whole))
        by_options.setdefault(options, []).append((index, chosen))
    running: Any = HydraConfig.instance()
    before = running.cfg
    try:
        for options, own in by_options.items():
            cfg = _composed(grid, options) if options else whole
            running.cfg = cfg  # interpolations such as ${hydra:runtime.choices.model} look there
            for index, chosen in own:
                values = _parsed(tuple(word for word in chosen if word not in options))
                ConfigLoaderImpl._apply_overrides_to_config(values, cfg)
                yield index, chosen, cfg
    finally:
        running.cfg = before


def choices(override: Override) -> list[str]:
    """Return the values of one swept setting, each as an override of its own."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _needs_composition(word: str, cfg: DictConfig) -> bool:
    """Whether an override chooses an option, or gives a mapping, which Hydra merges with what is there."""
    (parsed,) = _parsed((word,))
    return parsed.get_key_element() in cfg.hydra.runtime.choices or isinstance(parsed.value(), dict)


def _composed(grid: str, options: Sequence[str]) -> DictConfig:
    return compose("config", [f"experiment={grid}", *options], return_hydra_config=True)


@cache
def _parsed(words: tuple[str, ...]) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(words))


def cell(chosen: tuple[str, ...], cfg: DictConfig) -> Cell:
    """Return the cell of a composed configuration. ``chosen``: what it overrides."""
    settings, checkpoint = scientific(cfg), None if cfg.checkpoint is None else Path(cfg.checkpoint)
    signature = None
    if checkpoint is None or checkpoint.is_file():
        _, signature = signed(settings, checkpoint, _digest)
    return Cell(chosen, cfg.name, signature, checkpoint)


_digest = cache(digests.of_file)
