"""Names of SVD training runs in tables and figures, and the cost of a run in seconds and samples."""

import math

from spectrim.records.records import Record, algorithm_of

UNTRAINED = "_untrained"  # suffix of the name of a network that a run trains from scratch


def is_training(record: Record) -> bool:
    """Return whether the run is an SVD training."""
    return algorithm_of(record) == "svdtraining"


def seconds(record: Record, clock: str = "seconds") -> float:
    """Return the seconds that compression took, including training.

    The result is NaN for a run on a GPU: several runs share the GPU, so their times are not comparable.

    ``clock``: ``seconds`` for wall time, ``cpu_seconds`` for CPU time.
    """
    on_gpu = record["provenance"].get("device", "cpu") != "cpu"
    return math.nan if on_gpu else record["phases"]["select"].get(clock, math.nan)


def samples_read(record: Record) -> float:
    """Return the number of samples that the run read, each as often as it was read; NaN if the record has no count."""
    return sum(record["samples_read"].values()) if "samples_read" in record else math.nan


def from_scratch(record: Record) -> bool:
    """Return whether the run starts from an untrained network."""
    return record["config"]["checkpoint"] is None


def net(record: Record) -> str:
    """Return the network's name; it is the same whether the run starts from a trained network or from scratch."""
    return str(record["names"]["model"]).removesuffix(UNTRAINED)


def start(record: Record) -> str:
    """Return, in words, whether the run starts from scratch or from a trained network."""
    return "from scratch" if from_scratch(record) else "from a trained net"


def key(record: Record) -> tuple[str, float, float, int, bool, float]:
    """Return what tells trainings apart: regulariser, strength, epsilon, number of rank selections, and two options.

    The options are whether energy is priced, and the learning rate of unbounded steps; 0 if the steps are bounded.
    """
    settings = record["config"]["algorithm"]
    return (
        settings["regulariser"],
        0.0 if settings["regulariser"] == "none" else settings["strength"],
        settings["epsilon"],
        sum(bool(entry["bisection"]) for entry in record["log"]),
        bool(settings.get("priced")),
        0.0 if settings["bounded"] else settings["recipe"]["lr"],
    )


def way(record: Record) -> list[str]:
    """Return the ``key`` of a training in words, one part per setting."""
    regulariser, strength, epsilon, cuts, priced, lr = key(record)
    parts = [f"{regulariser} {strength:g}" if strength else regulariser, f"ε {epsilon:g}"]
    parts.append(f"{cuts} cut{'s' * (cuts != 1)}")
    if priced:
        parts.append("priced")
    if lr:
        parts.append(f"steps as printed, lr {lr:g}")
    return parts
