"""Load several sizes of a network from one file, and compare each with the model that is compressed to it."""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from measure import Outcome, Target, composed, noise_images, untrained
from torch import nn

import spectrim
from spectrim.algorithms.joint import Joint
from spectrim.batches import evaluating
from spectrim.checkpoints import single_file
from spectrim.data.images import ImageSplit
from spectrim.default_losses import default_loss
from spectrim.report.table import Column, Table
from spectrim.runs import configuration, targets
from spectrim.statistics.evaluation import evaluate
from spectrim.statistics.objective import Objective
from spectrim.statistics.remembered import MEASUREMENTS
from spectrim.surgery.reopening import factored_layers, kept_in
from spectrim.tools.memo import Memory

CHECKPOINTS = Path(__file__).resolve().parents[1] / "results" / "checkpoints"
SIZES = (0.9, 0.7, 0.5, 0.3)
COLUMNS = (
    Column("size", "asked %", 0, scale=100),
    Column("params_kept", "params kept %", 1, scale=100),
    Column("ranks_apart", "ranks that differ", 0),
    Column("cut_apart", "largest Δ score, cut", 6),
    Column("fitted_apart", "largest Δ score, refitted", 6),
    Column("made_accuracy", "top-1 %, made for it", 2, scale=100),
    Column("file_accuracy", "top-1 %, from the file", 2, scale=100),
    Column("cut_accuracy", "top-1 %, from the file, cut", 2, scale=100),
    Column("make_seconds", "seconds, made for it", 1),
    Column("load_seconds", "seconds, from the file", 1),
)


class Subject(NamedTuple):
    """One network with its data. ``kind``: its yaml. ``name``: as the checkpoint is called."""

    kind: str
    name: str
    model: nn.Module
    calibration: Any
    test: Any


def benchmark(quick: bool) -> Outcome:
    """Write one file for each network, then make each size and load it, with the refit and without."""
    sizes, name = ((0.5,), "lenet5") if quick else (SIZES, "resnet20")
    subjects = list(_noise(name) if quick else _trained(name))
    rows, bytes_of = list[dict[str, float]](), list[dict[str, int]]()
    with tempfile.TemporaryDirectory() as folder:
        for subject in subjects:
            found, files = _measured(subject, sizes, Path(folder), quick)
            rows += found
            bytes_of.append(files)
    data = pd.DataFrame(rows)
    how = {name: "max" if name.endswith("_apart") else "mean" for name in rows[0]}
    table = data.groupby("size", sort=False).agg(how).reset_index(drop=True)
    whole, dense, several = (max(own[key] for own in bytes_of) for key in ("whole", "dense", "several"))
    met = [
        Target("ranks unlike the plan for the size", float(data["ranks_apart"].max()), 0, False, "layers", 0),
        Target("largest difference of a score, cut", float(data["cut_apart"].max()), 1e-4, False, "parts", 6),
        Target("bytes of the file over those of the dense network", whole / dense, 2, at_least=False),
    ]
    notes = [
        *(target.line() for target in met),
        f"{len(subjects)} trainings of {name}; means, and for the differences the largest. Differences of scores are "
        "parts of the largest score, over 500 test images. A refit ends an iteration, so rounding can move it.",
        f"One file of every size: {whole / 1e6:.2f} MB. The dense network: {dense / 1e6:.2f} MB. A file for each of "
        f"the {len(sizes)} sizes: {several / 1e6:.2f} MB together.",
        "Made for it: joint selection with its defaults, whose expansion of the loss is remembered between sizes. "
        "From the file: loading, with the refit.",
    ]
    settings = {"quick": quick, "sizes": list(sizes), "networks": [subject.name for subject in subjects]}
    caption = f"Sizes of {name} from one file, against the models that are made for them"
    data_digest = "noise" if quick else subjects[0].test.digest()
    return Outcome(Table("sizes", table, COLUMNS, caption, notes), met, settings, data_digest)


def _noise(kind: str) -> Iterator[Subject]:
    yield Subject(kind, "untrained", untrained(kind), noise_images(16, 8), noise_images(16, 8))


def _trained(kind: str) -> Iterator[Subject]:
    cfg = composed(f"model={kind}", "data=cifar10")
    splits = targets.build(configuration.plain(cfg.data), "load").load()
    for seed in range(3):
        name = f"{kind}-cifar10-seed{seed}"
        model = single_file.load(CHECKPOINTS / f"{name}.safetensors", untrained(kind))
        yield Subject(kind, name, model.eval(), splits.calibration, splits.test)


def _measured(
    subject: Subject, sizes: Iterable[float], folder: Path, quick: bool
) -> tuple[list[dict[str, float]], dict[str, int]]:
    """Return a row for each size, and the bytes of the files."""
    path, loss = folder / f"{subject.name}.safetensors", default_loss(subject.model)
    objective = Objective(
        loss, {"calibration": subject.calibration}, memory=Memory(whitened=1, gates=1, **MEASUREMENTS)
    )
    more = {"samples": 8, "refit": 8} if quick else {}

    def made(size: float, **settings: Any) -> Any:
        return Joint(params_kept=size, **more | settings).compress(subject.model, Joint.decomposer, objective)

    def load(size: float, calibration: Any = None) -> nn.Module:
        into = untrained(subject.kind)
        return spectrim.load(path, into=into, params_kept=size, calibration=calibration)

    made(0.5).save(path, every_size=True)
    single_file.save(folder / "dense", subject.model, spectrim.RankPlan())
    several, rows = 0, []
    for size in sizes:
        result, make_seconds = _timed(made, size)
        fitted, load_seconds = _timed(load, size, subject.calibration)
        cut_made, cut = made(size, refit=0).model, load(size)
        result.save(folder / "one")
        several += (folder / "one").stat().st_size
        rows.append(
            {
                "size": size,
                "params_kept": result.params_kept,
                "ranks_apart": _ranks_apart(result.model, fitted),
                "cut_apart": _apart(cut_made, cut, subject.test),
                "fitted_apart": _apart(result.model, fitted, subject.test),
                "made_accuracy": _accuracy(result.model, subject.test),
                "file_accuracy": _accuracy(fitted, subject.test),
                "cut_accuracy": _accuracy(cut, subject.test),
                "make_seconds": make_seconds,
                "load_seconds": load_seconds,
            }
        )
    files = {"whole": path, "dense": folder / "dense"}
    return rows, {name: own.stat().st_size for name, own in files.items()} | {"several": several}


def _timed(work: Callable[..., Any], *given: Any) -> tuple[Any, float]:
    """Return what ``work`` returns, and its seconds."""
    started = time.perf_counter()
    return work(*given), time.perf_counter() - started


def _ranks_apart(one: nn.Module, other: nn.Module) -> int:
    """Return the number of layers whose rank or form differs."""
    ours, theirs = ({name: kept_in(own) for name, own in factored_layers(net).items()} for net in (one, other))
    return sum(ours.get(name) != theirs.get(name) for name in ours.keys() | theirs.keys())


def _apart(one: nn.Module, other: nn.Module, images: ImageSplit) -> float:
    """Return the largest difference of a score over 500 images, as a part of the largest score."""
    largest, most, seen = 0.0, 0.0, 0
    with evaluating(one), evaluating(other), torch.inference_mode():
        for x, _ in images:
            ours, theirs = one(x), other(x)
            largest, most = max(largest, float((ours - theirs).abs().max())), max(most, float(theirs.abs().max()))
            seen += len(x)
            if seen >= 500:
                break
    return largest / most


def _accuracy(model: nn.Module, images: ImageSplit) -> float:
    return evaluate(model, default_loss(model), images, "test").accuracy or 0.0
