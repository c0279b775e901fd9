"""Table 7: the size of weight changes up to which the first order predicts the loss, and the effect of leakage."""

import math
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from spectrim.records import records
from spectrim.records.records import Record
from spectrim.report import averages, claims, command, compare, frame
from spectrim.report.command import Options
from spectrim.report.compare import Verdict, Word
from spectrim.report.table import Column, Table, save

PUBLISHED = Path(__file__).with_name("published.csv")
SIZES = {
    # S1b's two bounds, 8e-3 and 2e-1, are edges of the entrywise bins.
    "max_abs_error": ("largest entry |δ|", (0, 1e-3, 8e-3, 2e-2, 5e-2, 2e-1, math.inf)),
    "relative_error": ("‖δ‖/‖W‖", (0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, math.inf)),
}
# The agreement that we require before we say that the first order holds.
SIGN_AGREEMENT = 0.9
RATIO = (0.5, 2.0)
HELD_OUT = "held_out"
SPLITS = (HELD_OUT, "train", "test")  # from which calibration is drawn
KEYS = ("algorithm", "mode")
MEASURES = (
    Column("count", "truncations", 0),
    Column("sign_agreement", "sign right %", 1, scale=100),
    Column("predicted", "median |predicted| Δ loss", 6),
    Column("measured", "median |measured| Δ loss", 6),
    Column("ratio", "median measured / predicted", 2, signed=True),
    Column("rank_correlation", "Spearman ρ", 2, signed=True),
    Column("predicted_lower", "predicted to lower", 0),
    Column("lowered", "of these did", 0),
)
LEAKAGE = (
    Column("model", "model"),
    Column("method", "method"),
    Column("calibration_from", "calibrated on"),
    Column("change_test_loss", "Δ test loss", 4, signed=True),
    Column("change_test_accuracy_pp", "Δ top-1 pp", 2, signed=True),
    Column("bought", "Δ test loss against held out", 4, signed=True),
    Column("params_kept", "params kept %", 1, scale=100),
    Column("n", "n (training × calibration seeds)"),
)
LEAKAGE_NOTE = (
    "Held out: images kept out of the training data. Test: the split that is reported, which is leakage; only this "
    "table does that. Δ = compressed − dense. A negative number against held out is a gain from calibrating on the "
    "other split."
)
PROBED = (
    "One layer is truncated at a time, and all others stay dense. The change of the loss is predicted and measured on "
    "the split of the gradient."
)


def build(options: Options) -> list[Path]:
    """Build the tables of the first order, by size of the change and by model, and the table of leakage."""
    found = command.load(options)
    runs = frame.runs(found)
    probes = _probes(found)
    tables = []
    if not probes.empty:
        tables += _probe_tables(options.name, probes, compare.read_published(PUBLISHED))
    leakage = runs[runs["algorithm"].isin(claims.PROMISING)]
    if not leakage.empty:
        caption = f"Effect of calibrating on other data, on {frame.data_of(leakage)}"
        rows = _leakage(leakage)
        table = Table(f"{options.name}_leakage", rows, LEAKAGE, caption, [LEAKAGE_NOTE], "model", KEYS)
        tables += [
            table,
            table.paper(("model", "method", "calibration_from", "change_test_loss", "bought", "params_kept")),
        ]
    if not tables:
        raise command.lacking(options, "probe, lossless or compact")
    return save(tables, options.out, command.origin(options, found, [PUBLISHED]))


def _probes(found: Sequence[Record]) -> pd.DataFrame:
    """Return one row per layer and rank that a probe measured."""
    rows: list[dict[str, Any]] = []
    for record in found:
        if records.algorithm_of(record) == "probe":
            about = {"record": records.name_of(record), "model": frame.model_of(record), "seed": record["seed"]}
            rows += [about | entry for entry in record["log"]]
    return pd.DataFrame(rows)


def _probe_tables(name: str, probes: pd.DataFrame, published: pd.DataFrame) -> list[Table]:
    models = sorted(set(probes["model"]), key=frame.model_key)
    rows = []
    for split, of_split in probes.groupby("split"):
        for key, (label, edges) in SIZES.items():
            for low, high in pairwise(edges):
                own = of_split[(of_split[key] > low) & (of_split[key] <= high)]
                if len(own):
                    rows.append({"split": split, "size": label, "bin": _bin(low, high), **_row(own)})
    bins = pd.DataFrame(rows)
    totals = [
        {"model": model, "split": split, **_row(own)}
        for model in models
        for split, own in probes[probes["model"] == model].groupby("split")
    ]
    first = (Column("split", "split"), Column("size", "size of the change"), Column("bin", "between"))
    notes = [PROBED, f"The rows take these models together: {', '.join(models)}.", _first_order(probes, published)]
    by_size = Table(
        name,
        bins,
        (*first, *MEASURES),
        "Agreement of the first order with the measured loss, by size of the change",
        notes,
        group="size",
    )
    by_model = Table(
        f"{name}_models",
        pd.DataFrame(totals),
        (Column("model", "model"), Column("split", "split"), *MEASURES),
        "Agreement of the first order with the measured loss, per model, over all sizes of the change",
        [PROBED],
        group="model",
    )
    agreement = ("count", "sign_agreement", "ratio", "rank_correlation")
    return [by_size, by_size.paper(("size", "bin", *agreement)), by_model, by_model.paper(("model", *agreement))]


def _bin(low: float, high: float) -> str:
    return f"> {low:g}" if math.isinf(high) else f"{low:g} – {high:g}"


def _row(own: pd.DataFrame) -> dict[str, Any]:
    return {**measures(own), "records": averages.records_of(own["record"])}


def measures(own: pd.DataFrame) -> dict[str, float]:
    """Return how predicted and measured changes agree in sign, size and order. Sign and ratio omit predicted zeros."""
    said = own[own["predicted"] != 0]
    right = (said["predicted"] * said["measured"] > 0).mean() if len(said) else math.nan
    lower = own[own["predicted"] < 0]
    varies = own["predicted"].nunique() > 1 and own["measured"].nunique() > 1
    return {
        "count": len(own),
        "sign_agreement": float(right),
        "predicted": float(own["predicted"].abs().median()),
        "measured": float(own["measured"].abs().median()),
        "ratio": float((said["measured"] / said["predicted"]).median()) if len(said) else math.nan,
        "rank_correlation": float(own["predicted"].rank().corr(own["measured"].rank())) if varies else math.nan,
        "predicted_lower": len(lower),
        "lowered": int((lower["measured"] < 0).sum()),
    }


def _first_order(probes: pd.DataFrame, published: pd.DataFrame) -> str:
    """Judge S1b's claim that the first order holds while no entry of the weight changes by more than its bound."""
    (claim,) = claims.claims(published, ["Text on the neighbourhood"])
    bound = claim.values["first_order_max_abs_error"]
    said = f"S1b: first order below a largest entry of {bound:g}"
    own = probes[probes["max_abs_error"] <= bound]
    if own.empty:
        least = probes["max_abs_error"].min()
        why = f"no truncation of ours is so small, the smallest changes an entry by {least:.2g}"
        return f"{said}: {Verdict(Word.OPEN, why)}."
    got = measures(own)
    holds = got["sign_agreement"] >= SIGN_AGREEMENT and RATIO[0] <= got["ratio"] <= RATIO[1]
    obtained = f"sign right in {100 * got['sign_agreement']:.0f} %, median ratio {got['ratio']:.2f}"
    asked = f"{100 * SIGN_AGREEMENT:.0f} % and a ratio of {RATIO[0]:g} – {RATIO[1]:g}"
    return f"{said}: {compare.judged(holds, f'{obtained}, {len(own)} truncations (asked: {asked})')}."


def _leakage(runs: pd.DataFrame) -> pd.DataFrame:
    """Return one row per model, method and split that calibration was drawn from."""
    skip = (*frame.SEEDS, "data.calibration_from", "paired")  # the last changes what a record holds, not what it finds
    named = runs.assign(
        setting=[records.signature({k: v for k, v in one.items() if k not in skip}) for one in runs["settings"]],
        method=runs["variant"],
    )
    values = ("change_test_loss", "change_test_accuracy_pp", "params_kept")
    by = ("model", "data", "setting", "method", "calibration_from", *KEYS)
    rows = averages.over_seeds(named, by, values)
    held = rows[rows["calibration_from"] == HELD_OUT].set_index(["model", "setting"])["change_test_loss"]
    base = [held.get((model, setting), math.nan) for model, setting in zip(rows["model"], rows["setting"], strict=True)]
    rows["bought"] = rows["change_test_loss"] - base
    rows.loc[rows["calibration_from"] == HELD_OUT, "bought"] = math.nan
    models = list(dict.fromkeys(zip(rows["model"], rows["data"], strict=True)))
    order = [
        (models.index((row["model"], row["data"])), claims.PROMISING.index(row["algorithm"]), row["mode"], at)
        for row, at in zip(rows.to_dict(orient="records"), rows["calibration_from"].map(SPLITS.index), strict=True)
    ]
    return rows.iloc[sorted(range(len(rows)), key=order.__getitem__)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script. Return its exit status."""
    return command.run(build, "table7", "table7", arguments)


if __name__ == "__main__":
    sys.exit(main())
