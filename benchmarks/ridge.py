"""Measure what it changes that layers with few samples choose the ridge of their refit, on images that none reads."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from measure import Outcome, composed, noise_images
from torch import nn
from tqdm import tqdm

from spectrim.algorithms.joint import Joint
from spectrim.checkpoints import single_file
from spectrim.data.images import ImageSplit
from spectrim.models.resnet import ResNet
from spectrim.refit import factors, ridge
from spectrim.refit.weighting import output_weights
from spectrim.report.paired import p_value
from spectrim.report.table import Column, Table
from spectrim.runs import configuration, targets
from spectrim.statistics.objective import Objective

ROOT = Path(__file__).resolve().parents[1]
CALIBRATION, VERIFICATION = 1000, 4000  # all of the 5,000 images that no training sees
DRAWS = (0, 1, 2)
CASES = {  # network → data, part of the parameters, whether each draw has a training of its own
    "lenet5": ("fashion_mnist", 0.05, True),
    "cct2": ("cifar10", 0.3, False),
    "resnext20": ("cifar10", 0.3, False),
    "densenet22": ("cifar10", 0.3, False),
}
COLUMNS = (
    Column("network", "network"),
    Column("size", "asked %", 0, scale=100),
    Column("layers", "layers that choose", 1),
    Column("rows", "rows per input", 1),
    Column("ridge", "log10 of their ridge", 1, signed=True),
    Column("least_pp", "Δ top-1 pp, least ridge", 2, signed=True),
    Column("chosen_pp", "Δ top-1 pp, chosen", 2, signed=True),
    Column("least", "Δ loss, least ridge", 4, signed=True),
    Column("chosen", "Δ loss, chosen", 4, signed=True),
    Column("gain", "chosen − least", 4, signed=True),
    Column("gain_p", "its p", 3),
)
NOTES = (
    "Joint selection with its refit by the loss. Δ: to the dense network, on the verification split, which neither a "
    "training nor a selection nor a refit reads. Mean ± standard deviation (ddof = 1) over three calibration draws; "
    "each draw of lenet5 has a training of its own. p: two-sided paired t-test over the draws.",
    f"Least ridge: {ridge.RIDGE:g} of the inputs' mean square in every layer. Chosen: layers with fewer than "
    f"{ridge.AMPLE} rows per input take the ridge with the least error on samples left out.",
)


QUICK = {"samples": 16, "refit": 40}  # settings of joint selection


class Case(NamedTuple):
    """A network, one calibration draw, and the images that it is judged on. ``settings``: of joint selection."""

    network: str
    size: float
    model: nn.Module
    objective: Objective
    verification: ImageSplit
    settings: dict[str, Any]


def benchmark(quick: bool) -> Outcome:
    """Compress each network once a draw, refit it with either ridge, and measure both."""
    cases, total = (_noise(), 2) if quick else (_trained(), len(CASES) * len(DRAWS))
    rows, digests = list[dict[str, Any]](), dict[str, None]()
    for case in tqdm(cases, desc="ridge", total=total, leave=False, disable=None):
        digests[case.verification.digest()] = None
        rows.append(_row(case))
    groups = pd.DataFrame(rows).groupby(["network", "size"], sort=False)
    data = groups.mean().join(groups.std(ddof=1), rsuffix="_std").reset_index()
    data["gain_p"] = list(map(p_value, data["gain"], data["gain_std"], groups.size()))
    caption = "A ridge that layers with few samples choose, against the least one in all layers"
    settings = {"quick": quick, "draws": list(DRAWS), "calibration": CALIBRATION, "verification": VERIFICATION}
    return Outcome(Table("ridge", data, COLUMNS, caption, list(NOTES)), [], settings, ", ".join(digests))


def _noise() -> Iterator[Case]:
    for seed in range(2):
        torch.manual_seed(seed)
        splits = {"calibration": noise_images(40, 8), "verification": noise_images(40, 8)}
        model = ResNet(8).eval()
        yield Case("ResNet-8 on noise", 0.3, model, Objective(F.cross_entropy, splits), splits["verification"], QUICK)


def _trained() -> Iterator[Case]:
    sizes = [f"data.calibration_size={CALIBRATION}", f"data.verification_size={VERIFICATION}"]
    for network, (data, size, own_training) in CASES.items():
        for draw in DRAWS:
            cfg = composed(f"model={network}", f"data={data}", f"data.calibration_seed={draw}", *sizes)
            splits = targets.build(configuration.plain(cfg.data), "load").load()
            model = targets.build(configuration.plain(cfg.model), "forward")
            seed = draw if own_training else 0
            single_file.load(ROOT / f"results/checkpoints/{network}-{data}-seed{seed}.safetensors", model)
            given = {name: getattr(splits, name) for name in ("calibration", "verification")}
            yield Case(network, size, model.eval(), Objective(splits.loss, given), splits.verification, {})


def _row(case: Case) -> dict[str, Any]:
    model, objective = case.model, case.objective
    joint = Joint(params_kept=case.size, **case.settings)
    cut = Joint(params_kept=case.size, **{**case.settings, "refit": 0}).compress(model, Joint.decomposer, objective)
    weights = output_weights("loss", model, list(cut.plan), objective, joint.refit)
    dense, row = objective.evaluate(model, "verification"), dict[str, Any](network=case.network, size=case.size)
    for name in ("least", "chosen"):
        refitted, chosen = copy.deepcopy(cut.model), list[tuple[float, float]]()
        with _choices(chosen if name == "chosen" else None):
            factors.refit(refitted, model, objective, joint.refit, weights)
        found = objective.evaluate(refitted, "verification")
        row[f"{name}_pp"] = 100 * (found.accuracy - dense.accuracy)
        row[name] = found.loss - dense.loss
    few = [(rows, one) for rows, one in chosen if rows < ridge.AMPLE]
    row |= {"layers": len(few), "gain": row["chosen"] - row["least"]}
    row["rows"] = sum(rows for rows, _ in few) / max(len(few), 1)
    row["ridge"] = sum(math.log10(one) for _, one in few) / max(len(few), 1)
    return row


@contextmanager
def _choices(seen: list[tuple[float, float]] | None) -> Iterator[None]:
    """Let layers choose their ridge, and note rows per input and the choice in ``seen``. None: all take the least."""
    original = factors.chosen_ridge

    def noted(*given: Any) -> float:
        if seen is None:
            return ridge.RIDGE
        moments = given[3]
        seen.append((moments.rows / moments.xx_gII.shape[-1], original(*given)))
        return seen[-1][1]

    factors.chosen_ridge = noted
    try:
        yield
    finally:
        factors.chosen_ridge = original
