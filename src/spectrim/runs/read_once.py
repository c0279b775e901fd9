"""Compose many configurations faster: read each yaml once, and parse each interpolation once."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import omegaconf.base
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.plugins.config_source import ConfigResult


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


@contextmanager
def read_once(loader: ConfigLoaderImpl | None = None) -> Iterator[None]:
    """Let the compositions of a loader share files and parsed interpolations while the block runs.

    A file that changes meanwhile is not read again. The configurations are the same as without the block.

    ``loader``: that of Hydra's sweeper; None: the one that ``hydra.compose`` takes.
    """
    loader = loader or GlobalHydra.instance().config_loader()  # type: ignore[assignment]
    assert isinstance(loader, ConfigLoaderImpl)
    repository, parse = loader.repository, omegaconf.base.parse
    loader.repository = _Files(repository)  # type: ignore[assignment]
    omegaconf.base.parse = cache(parse)
    try:
        yield
    finally:
        loader.repository, omegaconf.base.parse = repository, parse
