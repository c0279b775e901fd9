"""Time a whole one-shot lossless selection beside its gradient pass, which it cannot do without."""

from statistics import median

import pandas as pd
import torch.nn.functional as F
from measure import Outcome, Target, clocked, noise_images, seconds, untrained
from torch import nn

from spectrim.algorithms.lossless import Lossless
from spectrim.data.images import ImageSplit
from spectrim.decomposers.svd import SVD
from spectrim.report.table import Column, Table
from spectrim.statistics.objective import Objective
from spectrim.surgery import find_layers, replacing

COLUMNS = (
    Column("part", "part"),
    Column("seconds", "s", 3),
    Column("times", "times the gradient pass", 3),
)


def benchmark(quick: bool) -> Outcome:
    """Time ResNet-56 on images of noise. Nothing is remembered: model and objective are new at every measurement."""
    model, images, batch_size, repeats = ("resnet20", 32, 16, 2) if quick else ("resnet56", 2000, 500, 3)
    calibration = noise_images(images, batch_size)
    _select(model, noise_images(8, 8))  # the first call of each kernel is slow, and neither side should pay for it
    rows = pd.DataFrame([_once(model, calibration) for _ in range(repeats)])
    times = rows.div(rows["gradient pass alone"], axis=0)
    table = pd.DataFrame(
        [{"part": part, "seconds": median(rows[part]), "times": median(times[part])} for part in rows.columns]
    )
    ratio = median(times["whole selection"])
    target = Target(f"one-shot lossless selection on {model} over its gradient pass alone", ratio, 1.5, at_least=False)
    notes = [
        target.line(),
        f"{model}, random weights, {images} images of 3×32×32 in batches of {batch_size}, the defaults of a run on "
        f"CIFAR-10. Medians of {repeats} repeats, the ratio taken within each; model and objective are new every "
        "time, so nothing is remembered. With a dash: parts of the whole selection.",
    ]
    settings = {"quick": quick, "model": model, "images": images, "batch_size": batch_size, "repeats": repeats}
    settings["ratios"] = times["whole selection"].tolist()
    caption = f"One-shot lossless selection on {model} against its gradient pass"
    return Outcome(Table("selection", table, COLUMNS, caption, notes), [target], settings, calibration.digest())


def _fresh(model: str, calibration: ImageSplit) -> tuple[nn.Module, Objective]:
    return untrained(model), Objective(F.cross_entropy, {"calibration": calibration})


def _select(model: str, calibration: ImageSplit) -> float:
    network, objective = _fresh(model, calibration)
    return seconds(lambda: Lossless(gamma=None).compress(network, SVD(), objective))


def _once(model: str, calibration: ImageSplit) -> dict[str, float]:
    """Return the seconds of the gradient pass, of the whole selection, and of its parts."""
    network, objective = _fresh(model, calibration)
    layers = list(find_layers.factorable(network, objective.example())[0])
    alone = seconds(lambda: objective.gradients(network, layers))
    with (
        clocked(Objective, "gradients") as gradients,
        clocked(SVD, "spectrum") as decompositions,
        clocked(find_layers, "factorable") as finding,
        clocked(replacing, "apply") as cutting,
    ):
        whole = _select(model, calibration)
    parts = {
        "– gradient pass": sum(gradients),
        "– decompositions": sum(decompositions),
        "– finding the layers": sum(finding),
        "– cutting": sum(cutting),
    }
    rest = whole - sum(parts.values())
    return {"gradient pass alone": alone, "whole selection": whole, **parts, "– curves, choice, report": rest}
