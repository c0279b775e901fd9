"""One run: build, compress, measure and record what a configuration describes. One run is one record."""

import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from spectrim.algorithms.shared.compressed import Algorithm, Compressed
from spectrim.algorithms.shared.measurement import Measurement, Readings
from spectrim.cli import command_line, progress, run_lock, tracked_values
from spectrim.cli.messages import LOG, RESULTS
from spectrim.cli.tracking import Follower
from spectrim.decomposers.spectrum import Decomposer
from spectrim.errors import UserError
from spectrim.fetch import release
from spectrim.records import records
from spectrim.records.provenance import provenance
from spectrim.runs import configuration, signing, targets, task
from spectrim.statistics import batchnorm
from spectrim.tools import files, resume
from spectrim.tools.device import device_called
from spectrim.tools.profiling import Phases


def run(cfg: DictConfig) -> dict[str, Any]:
    """Return the record of one run: the one on disk, or else a new one, which is written.

    Raises ``UserError`` for settings that cannot be run, and for a damaged record.
    """
    settings = signing.scientific(cfg)
    batchnorm.require(cfg.batch_norm)
    if cfg.returns not in (None, "loss", "accuracy"):
        raise UserError(f"returns={cfg.returns} is not loss, accuracy or null")
    folder, name = Path(configuration.text(cfg, "records")), configuration.text(cfg, "name")
    checkpoint = _checkpoint(cfg)
    settings, signature = signing.signed(settings, checkpoint)
    path = records.path_of(folder, name, signature)
    about = partial(tracked_values.about, configuration.plain(cfg.names), name, signature, records.identity(settings))
    follower = Follower(configuration.plain(cfg.tracking), about, path)
    state = records.state_path(Path(configuration.text(cfg, "unfinished")), signature)
    make = partial(_measured, cfg, settings, signature, checkpoint, state)
    record, made = (records.read_own(path), False) if path.exists() else _made(path, folder, make, follower)
    progress.finished(computed=made)
    alone = not progress.in_grid()
    if made or alone:
        _say(record)
    if alone or not made:
        LOG.info("%s in %s", "recorded" if made else "already recorded", path)
    files.discard(state)  # Here too, because a kill may have come right after the record.
    follower.deliver(lambda: tracked_values.of_run(record))
    return record


def returned(record: dict[str, Any], metric: str | None) -> float | None:
    """Return the metric of the compressed model on the verification split; None where ``metric`` is None.

    Raises ``UserError`` where the record does not hold it.
    """
    if metric is None:
        return None
    if "verification" not in record:
        found = f"the record {record['signature']} in {record['experiment']} was made without returns={metric}"
        raise UserError(f"{found}; give the search a folder of its own by name=")
    value = record["verification"][metric]
    if value is None:
        raise UserError(f"returns={metric}, but a model for {record['names']['data']} has none; take returns=loss")
    return float(value)


def _made(
    path: Path, folder: Path, make: Callable[[], dict[str, Any]], follower: Follower
) -> tuple[dict[str, Any], bool]:
    """Make a record, and return it with True. Return False beside a record that another process made meanwhile."""
    files.require_writable(path)
    with run_lock.locked(path, wait=not progress.in_grid()):
        if path.exists():
            return records.read_own(path), False
        LOG.debug("the record will be %s", path)
        with command_line.failure_noted(path), follower.following():
            record = records.sealed(make())
            records.write(folder, record)
    return record, True


def _measured(
    cfg: DictConfig, settings: dict[str, Any], signature: str, checkpoint: Path | None, state: Path
) -> dict[str, Any]:
    """Build, compress and measure. Return the record of the run.

    ``state``: the file in which an algorithm may keep what it needs to go on after a kill.
    """
    algorithm = targets.build(_resumable(settings["algorithm"], state), "compress", "measure")
    decomposer = targets.build(settings["decomposer"], "spectrum")
    phases, device = Phases(), device_called(cfg.device)
    with phases.measure("load"):
        weights = None if checkpoint is None else (checkpoint, settings["checkpoint"])
        data, also = settings["data"], settings["also"]
        beside = settings["agreement"], settings["paired"]
        given = task.load(settings["model"], cfg.seed, weights, data, also, device, cfg.layers_at_once, *beside)
    given.objective.start_selection()
    with phases.measure("select"), resume.into(cfg.resume):
        found = _found(algorithm, given, decomposer, cfg.batch_norm)
    read = dict(given.objective.read)
    with phases.measure("evaluate"):
        outcome = given.outcome(found) if isinstance(found, Compressed) else given.readings(found)
    if cfg.returns:
        outcome["verification"] = given.verification(found)
    return {
        "schema": records.SCHEMA,
        "signature": signature,
        "experiment": cfg.name,
        "names": configuration.plain(cfg.names),
        "config": records.identity(settings),
        "seed": cfg.seed,
        "calibration_seed": settings["data"].get("calibration_seed", 0),
        **outcome,
        "phases": dict(phases),
        "samples_read": read,
        # A part of the phase "select" and of the samples that it read.
        "reporting": found.reporting if isinstance(found, Compressed) else {},
        "provenance": provenance(
            configuration.invocation("spectrim"), given.data_digest, settings["checkpoint"], str(device)
        ),
    }


def _found(
    algorithm: Algorithm | Measurement, given: task.Task, decomposer: Decomposer, batch_norm: batchnorm.BatchNorm
) -> Compressed | Readings:
    """Let an algorithm compress the model of the task, or a measurement measure it."""
    if isinstance(algorithm, Measurement):
        return algorithm.measure(given.model, decomposer, given.objective)
    compressed = algorithm.compress(given.model, decomposer, given.objective).settle(batch_norm, given.objective)
    compressed.reporter()  # made now, so that its time and its samples count here
    return compressed


def _resumable(algorithm: dict[str, Any], state: Path) -> dict[str, Any]:
    """Return the settings of an algorithm. One that trains or searches is given the file ``state``."""
    if "state" not in algorithm or algorithm["state"] is not None:
        return algorithm
    files.require_writable(state)
    return {**algorithm, "state": str(state)}


def _checkpoint(cfg: DictConfig) -> Path | None:
    if cfg.checkpoint is None:
        return None
    path = Path(configuration.text(cfg, "checkpoint"))
    if not path.is_file() and not release.checkpoint(path):
        composed = HydraConfig.get()
        net = [one for one in composed.overrides.task if one.startswith("model.")]
        chosen = [f"{group}={composed.runtime.choices[group]}" for group in ("model", "data")]
        make = shlex.join(["spectrim-train", *chosen, f"seed={cfg.seed}", *net, f"checkpoint={path}"])
        also = f"or set {release.ADDRESS} to the address of a release that has it"
        raise UserError(f"there is no checkpoint at {path}; make it by `{make}`, {also}")
    return path


def _say(record: dict[str, Any]) -> None:
    """Say what a run found; in a grid also how far the grid is, and the settings that vary."""
    names, dense, small = record["names"], record["dense"], record["compressed"]
    varied = progress.varied()
    about = f"{progress.said()}{names['model']}/{names['data']} {names['algorithm']}{f' ({varied})' if varied else ''}"
    if not record["layers"]:
        RESULTS.info("%s: %d rows measured, nothing compressed", about, len(record["log"]))
        return
    params, macs = small["params"] / dense["params"], small["macs"] / dense["macs"]
    RESULTS.info(
        f"{about}: params kept {100 * params:.1f} %, MACs {100 * macs:.1f} %; "
        f"test loss {dense['test']['loss']:.4f} -> {small['test']['loss']:.4f}, "
        f"top-1 {_percent(dense)} -> {_percent(small)} %"
    )
    for name, phase in record["phases"].items():
        LOG.debug("%s: %.1f s, peak %.0f MiB", name, phase["seconds"], phase["peak_mib"])


def _percent(measured: dict[str, Any]) -> str:
    accuracy = measured["test"]["accuracy"]
    return "n/a" if accuracy is None else f"{100 * accuracy:.2f}"


if __name__ == "__main__":
    from spectrim.cli.commands import compress

    compress()
