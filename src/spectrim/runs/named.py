"""Algorithms and decomposers by the names that the command line uses: those of the files in ``conf``."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spectrim.errors import UserError
from spectrim.runs import targets
from spectrim.runs.configuration import CONF
from spectrim.tools import spelling

OVERRIDE = (
    "override /decomposer@_global_.decomposer"  # in the list of defaults of an algorithm: the one it is best with
)
# Settings that say how small, of which an algorithm takes one.
SIZES = ("params_kept", "macs_kept", "milliseconds", "max_loss_increase", "rank", "ratio", "energy")


def named(group: str, name: str) -> Any:
    """Return the object that ``conf/GROUP/NAME.yaml`` describes.

    A setting that refers to the rest of a run, such as its seed or the recipe of its model, has the default of its
    class. Raises ``UserError`` for an unknown name, and for a class that needs such a setting.
    """
    known = sorted(path.stem for path in Path(CONF, group).glob("*.yaml"))
    if name not in known:
        raise UserError(f"{group}={name!r} is unknown{spelling.meant(name, known)}; known are {', '.join(known)}")
    try:
        return targets.build(_settings(group, name))
    except UserError as error:
        raise UserError(f"{group}={name!r} needs settings of its own; pass an instance ({error})") from error


def sizes_of(algorithm: Any) -> list[str]:
    """Return the names of the sizes that ``algorithm`` takes."""
    return [field.name for field in dataclasses.fields(algorithm) if field.name in SIZES]


def sized(algorithm: Any, size: str, value: float) -> Any:
    """Return ``algorithm`` with this size in place of the one that its file sets. It must be one of its sizes."""
    return dataclasses.replace(algorithm, **{**dict.fromkeys(sizes_of(algorithm)), size: value})


def decomposer_for(algorithm: str) -> Any:
    """Return the decomposer that ``conf/algorithm/NAME.yaml`` takes where none is named; None where that names none."""
    defaults = _read("algorithm", algorithm).get("defaults", [])
    own = [default[OVERRIDE] for default in defaults if OVERRIDE in default]
    others = (decomposer_for(default) for default in defaults if isinstance(default, str))
    return named("decomposer", own[0]) if own else next((one for one in others if one is not None), None)


def _read(group: str, name: str) -> dict[str, Any]:
    read: Any = OmegaConf.to_container(OmegaConf.load(Path(CONF, group, f"{name}.yaml")), resolve=False)
    return read


def _settings(group: str, name: str) -> dict[str, Any]:
    """Return the settings of one file and of those in its list of defaults."""
    read, settings = _read(group, name), dict[str, Any]()
    for default in read.pop("defaults", []):
        if isinstance(default, str):  # another file of the same group
            settings = _merged(settings, _settings(group, default))
            continue
        ((place, option),) = default.items()  # such as /algorithm@selector: truncation
        if place.startswith("override "):  # the choice of another group, which is no setting of this one
            continue
        other, _, key = place.removeprefix("/").partition("@")
        if not _refers(option):
            settings[key] = _settings(other, option)
    return _merged(settings, {key: own for key, value in read.items() for own in _alone(value)})


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return both, of which ``above`` counts where they differ, also within mappings that both hold, as with Hydra."""
    both = {key: (below[key], own) for key, own in above.items() if key in below}
    inner = {key: _merged(*pair) for key, pair in both.items() if all(isinstance(own, Mapping) for own in pair)}
    return {**below, **above, **inner}


def _alone(value: Any) -> list[Any]:
    """Return the value that a setting has without the rest of a run, if it has one: the default of an ``oc.select``."""
    if not _refers(value):
        return [value]
    try:
        return [OmegaConf.create({"value": value}).value]
    except OmegaConfBaseException:
        return []


def _refers(value: Any) -> bool:
    """Return whether a setting is an interpolation, whose value only a whole run has."""
    return isinstance(value, str) and "${" in value
