"""Make up records of Table 1: algorithms that cut, that train, and that choose their sizes themselves."""

import math
from collections.abc import Callable
from typing import Any

from spectrim.records import records

Record = dict[str, Any]
# Of each algorithm: its class, passes over the calibration images, and how much of the loss it loses beside the others.
CUTTING = {
    "reinforced": ("Reinforced", 42, 2.5),
    "bayesian": ("Bayesian", 41, 2.0),
    "evbmf": ("EVBMF", 0, 6.0),
    "layer_threshold": ("LayerThreshold", 240, 3.0),
    "pars": ("PARS", 82, 1.8),
    "joint": ("Joint", 10, 1.0),
}
TRAINING = {
    "haloc": ("HALOC", 0, 0.6),
    "l0_gates": ("L0Gates", 0, 0.5),
    "cuttlefish": ("Cuttlefish", 0, 0.4),
}
BUDGETS = (0.7, 0.5, 0.3)
FINE_TUNING = "FineTuning"
RECIPE = {"recipe": {"epochs": 4}}


def table1(make: Callable[..., Record], nets: tuple[str, ...] = ("resnet20", "vgg19_half")) -> list[Record]:
    """Return three seeds of every algorithm on each network. VGG-19 has one training seed and no run of PARS."""
    found = []
    for net in nets:
        for draw in (0, 1, 2):
            seed = draw if net == "resnet20" else 0
            cutting = {name: own for name, own in CUTTING.items() if (net, name) != ("vgg19_half", "pars")}
            for size in BUDGETS:
                budget = {"params_kept": size, "macs_kept": None}
                for name, (target, passes, worse) in cutting.items():
                    alone = {"_class_": target, **budget} | ({} if name == "evbmf" else {"seed": draw})
                    change = worse * (1 - size) ** 2 * (1 + 0.1 * draw)
                    found.append(_of(make, net, seed, draw, alone, size, change, passes, 0))
                    tuned = {"_class_": FINE_TUNING, "selector": alone, "seed": draw, **RECIPE}
                    found.append(_of(make, net, seed, draw, tuned, size, change / 10, passes, 4))
                for target, passes, worse in TRAINING.values():
                    settings = {"_class_": target, "seed": draw, **budget, **RECIPE}
                    change = worse * (1 - size) ** 2 * (1 + 0.1 * draw) / 3
                    found.append(_of(make, net, seed, draw, settings, size, change, passes, 4))
            found += _own_sizes(make, net, seed, draw)
    return found


def _own_sizes(make: Callable[..., Record], net: str, seed: int, draw: int) -> list[Record]:
    """Return SVD trainings that keep 54, 48, 12 and, from scratch, 31 %, and a lossless selection that keeps 92 %."""
    found = []
    for epsilon, kept, scratch in ((0.03, 0.54, False), (0.1, 0.48, False), (0.3, 0.12, False), (0.1, 0.31, True)):
        settings = {
            "_class_": "SVDTraining",
            "regulariser": "hoyer", "strength": 0.005, "epsilon": epsilon, "bounded": True, "seed": draw,
            "recipe": {"epochs": 16 if scratch else 4},
        }  # fmt: skip
        found.append(_of(make, net, seed, draw, settings, kept, 0.05 + epsilon / 10, 0, 4, scratch))
    lossless = {"_class_": "Lossless", "verified": True}
    return [*found, _of(make, net, seed, draw, lossless, 0.92, -0.001, 20, 0)]


def _of(
    make: Callable[..., Record],
    net: str,
    seed: int,
    draw: int,
    settings: dict[str, Any],
    kept: float,
    change: float,
    passes: int,
    epochs: int,
    scratch: bool = False,
) -> Record:
    """Return one run. A pass over the 2000 calibration images takes a second, an epoch of training a minute."""
    name = f"{net}_untrained" if scratch else net
    log = [{"epoch": epoch, "bisection": [{"delta": 0.1}] if epoch < 2 else []} for epoch in range(epochs)]
    one = make(name, seed=seed, calibration_seed=draw, kept=kept, change=change, experiment="table1", log=log)
    one["config"]["algorithm"] = settings
    if not epochs:
        one["config"]["batch_norm"] = "follow"
    if scratch:
        one["config"]["checkpoint"] = one["provenance"]["checkpoint_digest"] = None
        one["dense"]["test"] |= {"accuracy": 0.1, "loss": math.log(10)}
    one["samples_read"] = {"calibration": 2000 * passes, "train": 45_000 * epochs}
    seconds = 0.2 + passes + 60 * epochs + 0.1 * draw
    one["phases"]["select"] = {"seconds": 2 * seconds, "cpu_seconds": seconds, "peak_mib": 400.0, "added_mib": 10.0}
    return one | {"signature": records.signature(one["config"])}
