"""Convert records to a DataFrame with one row per run.

Losses are in nats, accuracies and shares in [0, 1], changes of accuracy in percentage points (``_pp``), times in
seconds. A change is always compressed minus dense, so a negative change of loss is an improvement.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from spectrim.errors import UserError
from spectrim.records import records
from spectrim.records.records import Record

FAMILIES = ("resnet", "resnext", "densenet", "vgg")
METHODS = ("truncation", "lossless", "compact")  # S1's selectors and their baseline, in the order of the rows
# Columns that tell rows apart for the code. Tables print ``model``, ``variant`` and ``method`` for the reader instead.
KEYS = ("network", "algorithm", "mode")
# Printed names of the selectors with a budget, by class name in lower case.
SELECTORS = {
    "truncation": "uniform truncation",
    "globalthreshold": "global threshold",
    "alds": "ALDS",
    "aimet": "AIMET, greedy",
    "sensitivity": "sensitivity (ASVD)",
    "knapsack": "knapsack (BALF)",
    "joint": "joint, ours",
}
PIVOTED = ", pivoted"  # after the name of a selector whose layers hold pivoted factors
BY_LOSS = ", by the loss"  # after the name of a selector whose refit weighs outputs by the loss
RULES = ("rank", "ratio", "energy", "params_kept")  # a truncation follows one of them
# Runs of one setting may differ in these keys only.
SEEDS = ("seed", "checkpoint", "data.calibration_seed")


def runs(found: Iterable[Record]) -> pd.DataFrame:
    """Return one row per run, ordered by model and method.

    Column ``algorithm``: the class name of the algorithm in lower case.
    Column ``mode``: ``one-shot`` or ``verified``; empty for an algorithm that knows no such choice.
    Column ``variant``: the algorithm and its main setting, for the reader.
    Column ``method``: the variant, and the settings that differ between runs of one model, for the reader.
    Column ``group``: equal for runs that differ only in their seeds.
    Column ``settings``: the flat configuration.
    Raises ``UserError`` where records of one model, data set and seed come from different checkpoints.
    """
    frame = pd.DataFrame([_row(record) for record in found])
    if frame.empty:
        return frame
    _one_checkpoint_a_seed(frame)
    differing = _differing(frame)
    frame["method"] = [
        ", ".join([variant, *(_said(key, value) for key, value in own)])
        for variant, own in zip(frame["variant"], differing, strict=True)
    ]
    rows: list[Any] = frame.to_dict(orient="records")
    keys = [_order(row, own) for row, own in zip(rows, differing, strict=True)]
    return frame.iloc[sorted(range(len(frame)), key=keys.__getitem__)].reset_index(drop=True)


def _row(record: Record) -> dict[str, Any]:
    config, dense, compressed = record["config"], record["dense"], record["compressed"]
    settings = flat(records.LATE["run"]) | flat({key: value for key, value in config.items() if key != "shape"})
    algorithm, model = records.algorithm_of(record), model_of(record)
    row: dict[str, Any] = {
        "signature": record["signature"],
        "record": records.name_of(record),
        "first_signature": records.first_signature(record),
        "experiment": record["experiment"],
        "model": model,
        "network": model,
        "data": record["names"]["data"],
        "algorithm": algorithm,
        "mode": mode(config["algorithm"]),
        "decomposer": record["names"].get("decomposer", ""),
        "factors": settings.get("decomposer.factors")
        or settings.get("decomposer.base.factors")
        or "plain",  # as stored
        "variant": _variant(algorithm, config["algorithm"]),
        "group": records.signature({key: value for key, value in settings.items() if key not in SEEDS}),
        "settings": settings,
        "seed": record["seed"],
        "calibration_seed": record.get("calibration_seed"),
        "calibration_from": settings.get("data.calibration_from", "held_out"),
        "ratio": settings.get("algorithm.ratio"),
        "params_kept": compressed["params"] / dense["params"],
        "macs_kept": compressed["macs"] / dense["macs"],
        "predicted_change": record.get("predicted_change"),
        "relative_error": _relative_error(record.get("layers", [])),
        "layers_kept": _layers_kept(record.get("layers", [])),
        "factored_layers": len(record.get("plan", {})),
        "seconds": sum(phase["seconds"] for phase in record.get("phases", {}).values()),
        "checkpoint_digest": record["provenance"].get("checkpoint_digest"),
    }
    for split in ("calibration", "test"):
        row |= _measured(split, dense[split], compressed[split])
    return row


def _measured(split: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """Return loss and accuracy on a split, before and after, and their changes. NaN: a task without classes."""
    right, right_before = (math.nan if one["accuracy"] is None else one["accuracy"] for one in (after, before))
    return {
        f"{split}_loss": after["loss"],
        f"{split}_accuracy": right,
        f"dense_{split}_loss": before["loss"],
        f"dense_{split}_accuracy": right_before,
        f"change_{split}_loss": after["loss"] - before["loss"],
        f"change_{split}_accuracy_pp": 100 * (right - right_before),
    }


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested configuration: ``{"data": {"size": 1}}`` → ``{"data.size": 1}``."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def model_of(record: Record) -> str:
    """Return the model's option, or its own name for torchvision classifiers, which share one option."""
    return str(record["config"]["model"].get("name") or record["names"]["model"])


def data_of(rows: pd.DataFrame) -> str:
    """Return the data sets of some rows, for a caption."""
    return ", ".join(dict.fromkeys(rows["data"]))


def mode(settings: Mapping[str, Any]) -> str:
    """Return whether a selector measured the loss (``verified``) or not (``one-shot``); empty if it has no choice."""
    return {True: "verified", False: "one-shot"}.get(settings.get("verified", ""), "")


def _variant(algorithm: str, settings: Mapping[str, Any]) -> str:
    if algorithm == "truncation":
        return ", ".join([algorithm, *(f"{rule.replace('_', ' ')} {value:g}" for rule, value in rules(settings))])
    if algorithm == "refitted":
        selector = settings["selector"]
        return f"{_variant(records.class_of(selector), selector)}, {algorithm}"
    return ", ".join(filter(None, [algorithm, mode(settings)]))


def rules(settings: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return the rules that a truncation was given, with their values."""
    return [(rule, settings[rule]) for rule in RULES if settings.get(rule) is not None]


def _relative_error(layers: Sequence[Mapping[str, Any]]) -> float:
    """Return the root mean square of ‖δ‖/‖W‖ (Frobenius) over the factorable layers; a layer left dense counts as 0."""
    squares = [(layer["relative_error"] or 0.0) ** 2 for layer in layers]
    return math.sqrt(sum(squares) / len(squares)) if squares else math.nan


def _layers_kept(layers: Sequence[Mapping[str, Any]]) -> float:
    """Return the share of parameters that the factorable layers keep: rank over break-even rank, weighted by size."""
    before = sum(layer["params_before"] for layer in layers)
    return sum(layer["params_after"] for layer in layers) / before if before else math.nan


def _one_checkpoint_a_seed(frame: pd.DataFrame) -> None:
    for (model, data, seed), rows in frame.groupby(["model", "data", "seed"]):
        if rows["checkpoint_digest"].nunique(dropna=False) > 1:
            raise UserError(
                f"records of {model} on {data}, seed {seed}, come from different checkpoints: delete the older records"
            )


def _differing(frame: pd.DataFrame) -> list[list[tuple[str, Any]]]:
    """Return, for each run, the settings that differ between the runs of one model and variant, with their values."""
    found: list[list[tuple[str, Any]]] = [[] for _ in frame.index]
    for _, rows in frame.groupby(["experiment", "model", "data", "variant"]):
        if rows["group"].nunique() < 2:
            continue
        keys = sorted({key for settings in rows["settings"] for key in settings} - set(SEEDS))
        values = {key: [setting(settings, key) for settings in rows["settings"]] for key in keys}
        differing = [key for key in keys if any(value != values[key][0] for value in values[key])]
        for index in rows.index:
            settings = frame["settings"][index]
            found[int(index)] = [(key, setting(settings, key)) for key in differing]
    return found


def setting(settings: Mapping[str, Any], key: str) -> Any:
    """Return a setting of a run; of one that a record omits, the value that older records were made with."""
    place, _, name = key.rpartition(".")
    owner = settings.get(f"{place}.{records.CLASS}", "")
    return settings.get(key, records.LATE.get(owner, {}).get(name))


def _said(key: str, value: Any) -> str:
    setting = key.rpartition(".")[2]
    if setting == records.CLASS:  # The class name alone is clear, such as that of a decomposer.
        return str(value)
    name = setting.replace("_", " ")
    return f"no {name}" if value is None else f"{name} {value}"


def _order(row: Mapping[str, Any], differing: Sequence[tuple[str, Any]]) -> tuple[Any, ...]:
    """Return the sort key of a run: model, algorithm, mode, larger truncations first, then the settings that differ."""
    known = METHODS.index(row["algorithm"]) if row["algorithm"] in METHODS else len(METHODS)
    chosen = {rule: row["settings"].get(f"algorithm.{rule}") for rule in RULES}
    larger_first = [(rule, -value) for rule, value in rules(chosen)] if row["algorithm"] == "truncation" else []
    values = [(value is None, *_comparable(value)) for _, value in differing]
    # The last key fixes the order of a mean's terms, and so its last digit.
    last = _natural(row["first_signature"])
    return model_key(row["model"]), known, row["algorithm"], row["mode"], larger_first, values, last


def _comparable(value: Any) -> tuple[float, str]:
    """Return a number, or else a text, in a form that sorts beside values of the other kind."""
    return (float(value), "") if isinstance(value, int | float) else (math.inf, str(value))


def require_one_setting(runs: pd.DataFrame, by: Sequence[str], named: str, place: str) -> None:
    """Raise ``UserError`` where runs of different settings would share one row or curve.

    ``by``: columns that group the runs.
    ``named``: format string over the columns that names a group in the message.
    ``place``: the part of the message that says what holds only one setting.
    """
    for _, own in runs.groupby(list(by)):
        count = own["group"].nunique()
        if count > 1:
            said = f"{count} settings of {named.format_map(own.iloc[0].to_dict())}"
            raise UserError(f"the records hold {said}: {place} for them; delete the older records")


def family(model: str) -> str:
    """Return the leading letters of a model's name: resnet20 and ResNet-50 → resnet."""
    found = re.match("[a-z]+", model.lower())
    return found.group() if found else ""


def missing(models: Iterable[str], families: Sequence[str] = FAMILIES) -> list[str]:
    """Return a note that lists the families without a model, or no note if every family has one."""
    present = {family(model) for model in models}
    absent = [name for name in families if name not in present]
    return [f"There are no records of: {', '.join(absent)}."] if absent else []


def model_key(model: str) -> tuple[Any, ...]:
    """Return the sort key of a model's name: known families first, then by name, with resnet20 before resnet110."""
    place = FAMILIES.index(family(model)) if family(model) in FAMILIES else len(FAMILIES)
    return place, _natural(model)


def _natural(name: str) -> list[tuple[int, str, float]]:
    """Return a sort key under which numbers inside names compare as numbers."""
    parts = re.findall(r"\d+|\D+", name)
    return [(1, "", float(part)) if part.isdigit() else (0, part, 0.0) for part in parts]
