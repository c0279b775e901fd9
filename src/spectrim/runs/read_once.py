"""Compose many configurations faster: read each yaml once, and parse each interpolation once."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import omegaconf.base
from hydra._internal import defaults_list
from hydra._internal.config_repository import CachingConfigRepository
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.default_element import InputDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig


class _Files(CachingConfigRepository):
    """The yaml files that compositions read, each kept as it was first read.

    Hydra keeps them for one composition. A composition alters what it is given, so each gets copies of its own.
    """

    def load_config(self, config_path: str) -> ConfigResult | None:
        return copy.deepcopy(super().load_config(config_path))

    def initialize_sources(self, config_search_path: ConfigSearchPath) -> None:
        self.delegate, self.cache = copy.deepcopy(self.delegate), {}  # The other compositions keep theirs.
        super().initialize_sources(config_search_path)

    def __deepcopy__(self, memo: object) -> "_Files":
        """Return what one composition takes. It shares the files until it asks for others."""
        return copy.copy(self)


def _choices_if_needed(overrides: Any, defaults: Sequence[InputDefault], self_added: bool) -> DictConfig | None:
    """Return the choices that interpolations in a defaults list refer to; None where the list has none.

    Hydra builds them for every list, which takes a seventh of a composition.
    """
    needed = any(default.is_interpolation() for default in defaults)
    return _choices(overrides, defaults, self_added) if needed else None


_choices: Any = defaults_list._create_interpolation_map


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    usual = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, usual)


@contextmanager
def read_once(loader: Any = None) -> Iterator[None]:
    """Let the compositions of a loader share files and parsed interpolations while the block runs.

    A file that changes meanwhile is not read again. The configurations are the same as without the block.

    ``loader``: that of Hydra's sweeper; None: the one that ``hydra.compose`` takes.
    """
    loader = loader or GlobalHydra.instance().config_loader()
    with (
        _replaced(loader, "repository", _Files(loader.repository)),
        _replaced(omegaconf.base, "parse", cache(omegaconf.base.parse)),
        _replaced(defaults_list, "_create_interpolation_map", _choices_if_needed),
    ):
        yield
