"""Convert records of selectors with a budget to curves of accuracy and loss over size, for Figure 4."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from spectrim.records.records import Record
from spectrim.report import averages, claims, command, compare, frame, looks
from spectrim.report.claims import Claim
from spectrim.report.command import Options
from spectrim.report.figure import Curve

# By the key that ``_key`` gives, in the order in which a panel draws them.
CURVES = {
    "truncation": Curve(frame.SELECTORS["truncation"], *looks.TRUNCATION),
    "energy": Curve("energy truncation", *looks.ENERGY),
    "globalthreshold": Curve(frame.SELECTORS["globalthreshold"], *looks.GLOBAL_THRESHOLD),
    "alds": Curve(frame.SELECTORS["alds"], *looks.ALDS),
    "aimet": Curve(frame.SELECTORS["aimet"], *looks.AIMET),
    "sensitivity": Curve(frame.SELECTORS["sensitivity"], *looks.SENSITIVITY),
    "knapsack": Curve(frame.SELECTORS["knapsack"], *looks.KNAPSACK),
    "refitted": Curve("knapsack (BALF), refitted as ours", *looks.REFITTED_KNAPSACK),
    "verified": Curve("joint, ours, loss verified", *looks.VERIFIED_JOINT),
    "joint": Curve(frame.SELECTORS["joint"], *looks.JOINT),
}
REFITS = ("refitted", "verified", "joint")  # curves whose refit moves the BatchNorm means with the factors
KEPT = ", BatchNorm kept"
NEAR = 0.005  # share of the parameters: a published size this close to a row is the same size
TARGETS = ("params_kept", "macs_kept", "milliseconds", "max_loss_increase", "energy", "ratio", "rank")
VALUES = ("params_kept", "macs_kept", "test_accuracy", "change_test_accuracy_pp", "test_loss", "change_test_loss")
POINT = ("network", "data", "method")  # not ``model``, which ``averages.with_dense`` may rename
# Columns for the code: the key of the curve, whether BatchNorm statistics stayed, whether factors are pivoted, whether
# the refit is by the loss, these four as one key, name and value of the request.
ABOUT = ("curve", "kept", "pivoted", "by_loss", "line", "target", "requested")
KEYS = (*frame.KEYS, *ABOUT)


def rows(runs: pd.DataFrame, published: Sequence[Claim]) -> pd.DataFrame:
    """Return one row per curve and size, averaged over seeds, with each model's dense row first.

    The columns are those of ``averages.with_dense``, ``KEYS``, ``decomposer``, ``asked`` (the request in words),
    ``published`` (the published change of accuracy at this size) and ``verdict`` (on ALDS as published).

    ``runs``: those of ``points``.
    ``published``: the points of the published curve.
    """
    about = runs.drop_duplicates(list(POINT))[[*POINT, *ABOUT, "decomposer", "asked"]]
    together = averages.with_dense(runs, VALUES).merge(about, "left", list(POINT))
    return pd.concat([_judged(own, of(published, own)) for _, own in together.groupby("model", sort=False)])


def of(published: Sequence[Claim], own: pd.DataFrame) -> list[Claim]:
    """Return the published points of the network and data of the rows ``own``."""
    names = [claims.plain(own[key].iloc[0]) for key in ("network", "data")]
    return [point for point in published if [claims.plain(point.model), claims.plain(point.data)] == names]


def points(options: Options, found: Sequence[Record]) -> pd.DataFrame:
    """Return the runs with ``variant`` the curve, ``asked`` the point on it and ``method`` both, in legend order.

    Raises ``UserError`` where one point would be drawn through runs of different settings.
    """
    runs = command.runs(options, found, [*frame.SELECTORS, "refitted"])
    keys = [_key(*run) for run in zip(runs["algorithm"], runs["settings"], strict=True)]
    requests = [_request(settings) for settings in runs["settings"]]
    kept = [
        key not in REFITS and settings["batch_norm"] == "keep"
        for key, settings in zip(keys, runs["settings"], strict=True)
    ]
    pivoted = runs["factors"] == "pivoted"
    by_loss = [frame.setting(settings, "algorithm.refit_by") == "loss" for settings in runs["settings"]]
    marks = [
        KEPT * still + frame.PIVOTED * stored + frame.BY_LOSS * weighed
        for still, stored, weighed in zip(kept, pivoted, by_loss, strict=True)
    ]
    runs = runs.assign(
        curve=keys,
        kept=kept,
        pivoted=pivoted,
        by_loss=by_loss,
        line=[key + mark for key, mark in zip(keys, marks, strict=True)],
        target=[target for target, _ in requests],
        requested=[value for _, value in requests],
        variant=[CURVES[key].name + mark for key, mark in zip(keys, marks, strict=True)],
        asked=[f"{target.replace('_', ' ')} {value:g}" for target, value in requests],
        place=[list(CURVES).index(key) for key in keys],
        size=[-value for _, value in requests],
    )
    point = ["model", "data", "variant", "asked"]
    frame.require_one_setting(runs, point, "{variant} at {asked} on {model}, {data}", "Figure 4 has one point")
    runs["method"] = runs["variant"] + ", " + runs["asked"]
    return runs.sort_values(["model", "place", "variant", "size", "first_signature"], kind="stable")


def _key(algorithm: str, settings: Mapping[str, Any]) -> str:
    """Return the key in ``CURVES``."""
    energy = settings.get("algorithm.energy") is not None or settings.get("algorithm.common") == "energy"
    if algorithm == "truncation" and energy:
        return "energy"
    return "verified" if settings.get("algorithm.max_loss_increase") is not None else algorithm


def _request(settings: Mapping[str, Any]) -> tuple[str, float]:
    """Return the name and the value of what a run was to meet, such as ``params_kept`` and 0.5."""
    given = {key: settings.get(f"algorithm.{key}", settings.get(f"algorithm.selector.{key}")) for key in TARGETS}
    name, value = next((name, value) for name, value in given.items() if value is not None)
    return name, float(value)


def _judged(own: pd.DataFrame, points: Sequence[Claim]) -> pd.DataFrame:
    """Add the published change of accuracy at each row's size, and whether ALDS as published meets it."""
    changes: list[float] = []
    verdicts: list[compare.Verdict | None] = []
    for _, row in own.iterrows():
        near = [point for point in points if abs(1 - point.drop - row["params_kept"]) <= NEAR]
        point = near[0] if near and row["algorithm"] != "dense" else None
        changes.append(math.nan if point is None else point.values["change_top1_pp"])
        same = point is not None and row["curve"] == "alds" and row["kept"]
        tolerance = math.nan if point is None else point.tolerances["change_top1_pp"]
        verdicts.append(compare.verdict(changes[-1], row["change_test_accuracy_pp"], tolerance) if same else None)
    return own.assign(published=changes, verdict=pd.Series(verdicts, index=own.index, dtype=object))
