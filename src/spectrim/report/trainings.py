"""What a run of SVD training is called in tables and figures, and how long a run that may train took."""

import math

from spectrim.records.records import Record, class_of

UNTRAINED = "_untrained"  # of the name of a net that a run trains from scratch


def is_training(record: Record) -> bool:
    """Whether the run is one of SVD training."""
    return class_of(record["config"]["algorithm"]) == "SVDTraining"


def seconds(record: Record, clock: str = "seconds") -> float:
    """Of compression, training included, by the clock of the wall or that of the processor (``cpu_seconds``).

    NaN where a GPU computed: several runs share one, which measures none of them.
    """
    on_gpu = record["provenance"].get("device", "cpu") != "cpu"
    return math.nan if on_gpu else record["phases"]["select"].get(clock, math.nan)


def net(record: Record) -> str:
    """The net, whether a run starts from a trained one or from scratch."""
    return str(record["names"]["model"]).removesuffix(UNTRAINED)


def start(record: Record) -> str:
    """What the run starts from."""
    return "from scratch" if record["config"]["checkpoint"] is None else "from a trained net"


def way(record: Record) -> str:
    """The regulariser and its weight, epsilon, in how many epochs ranks were selected, and what is out of the usual."""
    settings = record["config"]["algorithm"]
    strength = "" if settings["regulariser"] == "none" else f" {settings['strength']:g}"
    cuts = sum(bool(entry["bisection"]) for entry in record["log"])
    parts = [f"{settings['regulariser']}{strength}", f"ε {settings['epsilon']:g}", f"{cuts} cut{'s' * (cuts != 1)}"]
    if settings.get("priced"):
        parts.append("priced")
    if not settings["bounded"]:
        parts.append(f"steps as printed, lr {settings['recipe']['lr']:g}")
    return ", ".join(parts)
