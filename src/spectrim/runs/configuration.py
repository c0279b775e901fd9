"""Read a composed configuration: its nodes as plain values, the names of grids, the command, and errors in one line."""

import shlex
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spectrim.errors import UserError
from spectrim.tools import spelling

# The package ``spectrim.conf``; in a checkout, a link to the folder ``conf``.
CONF = str(Path(__file__).resolve().parents[1] / "conf")
EXPERIMENTS = Path(CONF) / "experiment"
# Each line holds a former and a present name. The commands in committed records use the former ones.
FORMER_NAMES = EXPERIMENTS / "former_names.txt"
# Options that a package brings, with the extra that installs it.
EXTRAS = {"hydra/launcher/submitit_slurm": "cluster", "hydra/launcher/submitit_local": "cluster"}
MISTAKES = (UserError, HydraException, OmegaConfBaseException)  # of a user; anything else is a fault of ours
NEAR = 8  # the most grids that an error lists


def plain(node: DictConfig) -> dict[str, Any]:
    """Resolve the interpolations of a node and return plain dicts, lists, numbers and strings."""
    return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def experiments() -> list[str]:
    """Return the names of all grids. A file or folder that begins with an underscore is a part of grids."""
    found = (path.relative_to(EXPERIMENTS).with_suffix("") for path in EXPERIMENTS.rglob("*.yaml"))
    return sorted(path.as_posix() for path in found if not any(part.startswith("_") for part in path.parts))


def grids_called(name: str) -> list[str]:
    """Return the grid of this name, or all grids of a folder. Raises ``UserError`` where there is neither."""
    names = experiments()
    if name in names:
        return [name]
    if below := [one for one in names if one.startswith(f"{name.strip('/')}/")]:
        return below
    if (present := _present_name(name)) not in names:
        raise UserError(unknown_experiment(name))
    return [present]


def present_names(words: Sequence[str]) -> list[str]:
    """Return the words of a command with the former name of a grid replaced by its present one."""
    key = "experiment="
    return [key + _present_name(word.removeprefix(key)) if word.startswith(key) else word for word in words]


def _present_name(name: str) -> str:
    """Return the present name of a grid, or the same name where no grid was called so."""
    if name in experiments():
        return name
    lines = FORMER_NAMES.read_text(encoding="utf-8").splitlines()
    known = dict(line.split() for line in lines if not line.startswith("#"))
    return known.get(name.replace(" ", ""), name)


def check_choices() -> None:
    """Refuse a single run of a grid that leaves a swept setting open: it would belong to no grid."""
    if not HydraConfig.initialized():
        return
    composed = HydraConfig.get()
    given = {word.lstrip("+").partition("=")[0] for word in composed.overrides.task}
    left = [key for key in composed.sweeper.get("params") or {} if key not in given]
    if left:
        name = composed.runtime.choices.get("experiment")
        raise UserError(f"experiment={name} is a grid over {', '.join(left)}: add -m, or give each of them one value")


def text(cfg: DictConfig, key: str) -> str:
    """Return a name or a path of the configuration. Raises ``UserError`` where it is not text, or is empty."""
    if not isinstance(cfg[key], str) or not cfg[key]:
        raise UserError(f"{key}={cfg[key]!r} is not text; give a name or a path")
    return cfg[key]


def invocation(program: str) -> str:
    """Return the shell command of this run, also for a cell of a grid."""
    return shlex.join([program, *HydraConfig.get().overrides.task]) if HydraConfig.initialized() else program


def innermost(error: BaseException) -> str:
    """Return the message of the first ``UserError`` in the chain, else the first message in it, in one line."""
    cause: BaseException | None = error
    said = ""  # Hydra raises some errors without a message, from one that has it
    while cause is not None:
        said = said or " ".join(str(cause).partition("Config search path:")[0].split())
        if isinstance(cause, UserError):
            return str(cause)
        if isinstance(cause, MissingConfigException) and str(cause.missing_cfg_file).startswith("experiment/"):
            return unknown_experiment(str(cause.missing_cfg_file).removeprefix("experiment/"))
        if isinstance(cause, MissingConfigException) and cause.missing_cfg_file in EXTRAS:
            extra = EXTRAS[cause.missing_cfg_file]
            return f"{cause.missing_cfg_file} needs extra packages: pip install 'spectrim[{extra}]'"
        if isinstance(cause, MissingConfigException) and cause.missing_cfg_file and cause.options:
            group, _, name = cause.missing_cfg_file.rpartition("/")
            near = spelling.meant(name, cause.options)
            return f"{group}={name} is unknown{near}; known are {', '.join(cause.options)}"
        if isinstance(cause, OmegaConfBaseException) and said.startswith("Could not override"):
            return _unknown_setting(cause) or said
        cause = cause.__cause__
    return said or type(error).__name__


def _unknown_setting(error: OmegaConfBaseException) -> str:
    """Return the line that tells which settings stand beside an unknown one; empty where any may be added."""
    node, parent = error.parent_node or OmegaConf.create({}), str(error.full_key).rpartition(".")[0]
    beside = [str(key) for key in node if not str(key).startswith("_")]
    if not beside:
        return ""
    known = {key: f"{parent}.{key}" if parent else key for key in beside}
    if not parent:  # a group such as experiment is no setting, and algorithm. may have been forgotten
        known |= {path.name: path.name for path in Path(CONF).iterdir() if path.is_dir()}
        inner = [f"{key}.{own}" for key in beside if isinstance(node._get_node(key), DictConfig) for own in node[key]]
        known = {name.rpartition(".")[2]: name for name in inner} | known
    near = known.get(spelling.nearest(str(error.key), known))
    said = f"did you mean {near}?" if near else f"{parent or 'the configuration'} has {', '.join(beside)}"
    return f"{error.full_key} is no setting; {said}"


def unknown_experiment(name: str) -> str:
    """Return the line that tells which grids have a name near to an unknown one."""
    names = experiments()
    below = [one for one in names if one.startswith(f"{name.strip('/')}/")]
    ending = [one for one in names if one.endswith(f"/{name.strip('/')}")]
    near = below or ending or get_close_matches(name, names, 5, 0.5)
    listed = ", ".join(near[:NEAR]) + ", …" * (len(near) > NEAR)
    said = "is a folder of grids" if below else "is no grid"
    return f"experiment={name} {said}: {f'choose {listed}' if near else f'the grids lie in {EXPERIMENTS}'}"
