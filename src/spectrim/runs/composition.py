"""Check a configuration as soon as Hydra has composed it, before Hydra builds or configures anything from it.

Hydra builds callbacks, a launcher and a sweeper, sets up logging and sets environment variables from its own node,
``hydra``. Any yaml can write there, so without these checks a yaml alone could run code.
"""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, RangeSweep
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spectrim.errors import UserError
from spectrim.runs import targets
from spectrim.runs.configuration import CONF

# The launchers and sweepers that may stand in the node ``hydra``; the others of Hydra's plugins are not tested here.
PLUGINS = (
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
    "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
    "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
)
# What logging may build, and the streams that it may write to; ``logging.config`` would call anything.
HANDLERS = ("logging.StreamHandler", "logging.NullHandler")
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
SHELL = ("setup", "additional_parameters")  # of the launcher for Slurm: lines of a shell script
# Environment variable: the folder in which a command of ours collects what its cells say; set while the command runs.
FOLDER = "SPECTRIM_GRID_FOLDER"
# Environment variable: the sweep that runs, for the processes of its cells.
SWEEP = "SPECTRIM_SWEEP"
MOST_CELLS = 10_000  # Hydra composes every cell before the first run: this many take a quarter of an hour


def guard() -> None:
    """Make every composition of our commands pass ``check`` first, also those of a single cell in a worker.

    Another application of Hydra in this process is not checked, whatever it takes from our configuration.
    """
    usual: Callable[..., DictConfig] = ConfigLoaderImpl.load_configuration
    if hasattr(usual, "__wrapped__"):
        return

    @wraps(usual)
    def checked(
        self: ConfigLoaderImpl,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        *more: Any,
        **named: Any,
    ) -> DictConfig:
        cfg = usual(self, config_name, overrides, run_mode, *more, **named)
        if _is_ours(self):
            check(cfg, run_mode, overrides)
        return cfg

    ConfigLoaderImpl.load_configuration = checked  # type: ignore[method-assign]


def _is_ours(loader: ConfigLoaderImpl) -> bool:
    """Return whether a command of ours composes, or a worker of one: on another machine it has no ``FOLDER``."""
    first = [str(source.path) for source in loader.get_search_path().get_path() if source.provider == "main"]
    return FOLDER in os.environ or [path.removeprefix("file://") for path in first] == [CONF]


def check(cfg: DictConfig, mode: RunMode | None = None, words: Sequence[str] = ()) -> None:
    """Refuse a composed configuration that could run foreign code, or that asks for absurdly much.

    ``mode``: whether a single run or a sweep is composed.
    ``words``: the overrides of the command line. They are the user's own, so they may do more than a yaml.
    Raises ``UserError`` in one line.
    """
    for key in cfg:
        if key != "hydra" and OmegaConf.is_config(cfg._get_node(key)):
            targets.check_targets(OmegaConf.to_container(cfg._get_node(key), resolve=False), f"config.{key!s}")
    _check_plugins(OmegaConf.to_container(cfg.hydra, resolve=False), "hydra")
    for part in ("callbacks", "launcher", "sweeper", "hydra_logging", "job_logging"):
        _check_plugins(_resolved(cfg.hydra, part), f"hydra.{part}")
    for part in ("hydra_logging", "job_logging"):
        _check_logging(_resolved(cfg.hydra, part), f"hydra.{part}")
    for name, value in cfg.hydra.job.env_set.items():
        if os.environ.get(name) != value:
            raise UserError(f"hydra.job.env_set.{name} is refused: set environment variables in the shell")
    _check_jobs(cfg.hydra.launcher)
    _check_shell(_resolved(cfg.hydra, "launcher"), words)
    if mode is RunMode.MULTIRUN:
        cells, keys = check_sweep([*_params(cfg), *cfg.hydra.overrides.task])
        # The first composition of a command is that of the sweep; those of its cells follow.
        os.environ.setdefault(SWEEP, json.dumps({"cells": cells, "keys": keys, "began": time.time()}))


def _resolved(node: DictConfig, key: str) -> Any:
    """Return a node without interpolations, which may hide what is built. Refuse one that cannot be resolved yet."""
    found = node[key]
    try:
        return OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
    except OmegaConfBaseException as error:
        raise UserError(f"hydra.{key} is refused: {' '.join(str(error).split())}") from error


def _check_plugins(node: Any, where: str) -> None:
    for place, key, value in targets.entries(node, where):
        if key == "_target_" and value not in PLUGINS:
            raise UserError(f"{place}={value} is refused: it is no launcher or sweeper of Hydra")


def _check_logging(node: Any, where: str) -> None:
    """Refuse what ``logging.config.dictConfig`` would import and call: a class, a factory ``()``, a reference."""
    for place, key, value in targets.entries(node, where):
        refers = isinstance(value, str) and value.startswith(("ext://", "cfg://")) and value not in STREAMS
        if key in ("()", ".") or (key == "class" and value not in HANDLERS) or refers:
            raise UserError(f"{place}={value} is refused: use hydra/job_logging=stdout or none")


def _check_jobs(launcher: DictConfig) -> None:
    jobs, cores = launcher.get("n_jobs"), os.cpu_count() or 1
    if type(jobs) is int and jobs > max(16, 4 * cores):  # runs that share a GPU may outnumber the cores
        raise UserError(
            f"hydra.launcher.n_jobs={jobs} is too many for {cores} cores; give at most {max(16, 4 * cores)}"
        )


def _check_shell(launcher: dict[str, Any], words: Sequence[str]) -> None:
    """Refuse what would put commands of a yaml into the script that Slurm runs."""
    for key in SHELL:
        if launcher.get(key) and not any(word.lstrip("+").startswith(f"hydra.launcher.{key}") for word in words):
            raise UserError(f"hydra.launcher.{key} is refused in a yaml: give it on the command line")
    for key, value in launcher.items():
        if isinstance(value, str) and len(value.splitlines()) > 1:
            raise UserError(f"hydra.launcher.{key} is refused: it has more than one line")


def _params(cfg: DictConfig) -> list[str]:
    return [f"{key}={values}" for key, values in (cfg.hydra.sweeper.get("params") or {}).items()]


def check_sweep(overrides: Sequence[str]) -> tuple[int, list[str]]:
    """Return the number of cells of a sweep and the settings that vary.

    Raises ``UserError`` for too many cells, before their values are listed, and for a sweep over experiments, which
    loses their own sweeps.
    """
    swept = {one.get_key_element(): one for one in OverridesParser.create().parse_overrides(list(overrides))}
    if "experiment" in swept and swept["experiment"].is_sweep_override():
        raise UserError(f"{swept['experiment'].input_line} sweeps no grid: give one experiment a command")
    cells = math.prod(_count(one) for one in swept.values())
    if cells > MOST_CELLS:
        raise UserError(f"the sweep has {cells} cells, more than {MOST_CELLS}: sweep fewer values")
    return cells, [key for key, one in swept.items() if one.is_sweep_override()]


def _count(override: Override) -> int:
    """Return the number of values of an override, without listing those of a range."""
    value = override.value()
    if not override.is_sweep_override():
        return 1
    if not isinstance(value, RangeSweep):
        return len(getattr(value, "list", [])) or 1
    try:
        return max(0, math.ceil((value.stop - value.start) / value.step))  # type: ignore[operator]
    except (TypeError, ArithmeticError, ValueError) as error:
        raise UserError(f"{override.input_line} has no end: give range(START, STOP, STEP)") from error
