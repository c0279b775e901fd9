"""Names of SVD training runs in tables and figures, and the time that a run takes."""

import math

from spectrim.records.records import Record, class_of

UNTRAINED = "_untrained"  # suffix of the name of a network that a run trains from scratch


def is_training(record: Record) -> bool:
    """Return whether the run is an SVD training."""
    return class_of(record["config"]["algorithm"]) == "SVDTraining"


def seconds(record: Record, clock: str = "seconds") -> float:
    """Return the seconds that compression took, including training.

    The result is NaN for a run on a GPU: several runs share the GPU, so their times are not comparable.

    ``clock``: ``seconds`` for wall time, ``cpu_seconds`` for CPU time.
    """
    on_gpu = record["provenance"].get("device", "cpu") != "cpu"
    return math.nan if on_gpu else record["phases"]["select"].get(clock, math.nan)


def net(record: Record) -> str:
    """Return the network's name; it is the same whether the run starts from a trained network or from scratch."""
    return str(record["names"]["model"]).removesuffix(UNTRAINED)


def start(record: Record) -> str:
    """Return, in words, whether the run starts from scratch or from a trained network."""
    return "from scratch" if record["config"]["checkpoint"] is None else "from a trained net"


def way(record: Record) -> str:
    """Describe the settings: regulariser and strength, epsilon, number of rank selections, and unusual options."""
    settings = record["config"]["algorithm"]
    strength = "" if settings["regulariser"] == "none" else f" {settings['strength']:g}"
    cuts = sum(bool(entry["bisection"]) for entry in record["log"])
    parts = [f"{settings['regulariser']}{strength}", f"ε {settings['epsilon']:g}", f"{cuts} cut{'s' * (cuts != 1)}"]
    if settings.get("priced"):
        parts.append("priced")
    if not settings["bounded"]:
        parts.append(f"steps as printed, lr {settings['recipe']['lr']:g}")
    return ", ".join(parts)
