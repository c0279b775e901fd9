"""Claims of the papers about compressed networks, and verdicts on whether our records confirm them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from spectrim.report.compare import Verdict, Word, judged, verdict
from spectrim.report.table import number

# In the grid at the papers' scale an image folder holds ImageNet. Every other data set is a different
# task from the papers'.
PAPER_DATA = ("imagenet", "image_folder")
PROMISING = ("lossless", "compact")  # the selectors that promise a loss not above the dense network's


@dataclass(frozen=True)
class Claim:
    """One published claim.

    ``values``: published numbers by metric; losses in nats, top-1 accuracy and drop in percent, as printed.
    ``tolerances``: the tolerance of each metric; NaN where none is stated.
    """

    name: str
    source: str
    where: str
    model: str
    data: str
    values: dict[str, float]
    tolerances: dict[str, float]
    note: str

    @property
    def change(self) -> float:
        """Published change of the loss, compressed minus original, in nats; NaN if it is not printed."""
        return self.values.get("compressed_loss", math.nan) - self.values.get("original_loss", math.nan)

    @property
    def drop(self) -> float:
        """Published share of parameters removed; NaN if it is not printed."""
        return self.values.get("drop_percent", math.nan) / 100

    @property
    def said(self) -> str:
        """The claim in words: model, data, original and compressed loss, and the drop in size."""
        subject = ", ".join(part for part in (self.model, self.data) if part)
        others = [f"{key.replace('_', ' ')} {value:g}" for key, value in self.values.items() if key != "drop_percent"]
        if not math.isnan(self.change):
            losses = f"{self.values['original_loss']:.4f} → {self.values['compressed_loss']:.4f}"
            said = f"loss {losses} ({number(self.change, 4, True)})"
        else:
            said = ", ".join(others) or "loss below the original's"
        at = "" if math.isnan(self.drop) else f" at a drop of {100 * self.drop:.0f} %"
        return (f"{subject}: " if subject else "") + said + at


def claims(published: pd.DataFrame, where: Sequence[str] = ()) -> list[Claim]:
    """Return the claims in the order of the file.

    ``where``: places in the papers to select, such as "Table 4"; all of them if it is empty.
    """
    found = []
    for name, rows in published.groupby("claim", sort=False):
        first = rows.iloc[0]
        if where and first["where"] not in where:
            continue
        given = rows[rows["value"].notna()]
        found.append(
            Claim(
                name=str(name),
                source=f"{first['source']} {first['where']}",
                where=first["where"],
                model=first["model"],
                data=first["data"],
                values={key: float(value) for key, value in zip(given["metric"], given["value"], strict=True)},
                tolerances={key: float(value) for key, value in zip(given["metric"], given["tolerance"], strict=True)},
                note=first["note"],
            )
        )
    return found


def judge(claim: Claim, ours: pd.DataFrame, dense: pd.DataFrame) -> Verdict:
    """Judge a claim against our results for one model.

    If network and data match the claim, our numbers must first meet the published numbers. In every case the loss must
    not exceed the original's at the published drop.

    ``ours``: the lossless and compact rows of the model.
    ``dense``: its dense row.
    """
    if math.isnan(claim.drop):
        return Verdict(Word.OPEN, "not a claim about the loss of a compressed net")
    relation = lossless_claim(ours, claim.drop)
    if ours.empty or not _same(claim, ours.iloc[0]):
        return relation
    near = ours.iloc[int((1 - ours["params_kept"] - claim.drop).abs().argmin())]
    obtained = {
        "original_loss": float(dense.iloc[0]["test_loss"]),
        "original_top1_percent": 100 * float(dense.iloc[0]["test_accuracy"]),
        "compressed_loss": float(near["test_loss"]),
        "compressed_top1_percent": 100 * float(near["test_accuracy"]),
        "drop_percent": 100 * float(1 - near["params_kept"]),
    }
    for metric, value in claim.values.items():
        found = verdict(value, obtained.get(metric), claim.tolerances[metric])
        if found.word is Word.FAILS:
            return judged(False, f"{metric.replace('_', ' ')} {found.why} ({near['method']})")
    return relation


def _same(claim: Claim, row: "pd.Series[Any]") -> bool:
    return row["data"] in PAPER_DATA and plain(row["network"]).startswith(plain(claim.model))


def plain(name: str) -> str:
    """Return the letters and digits of a name in lower case, so that a paper's ResNet-20 is our resnet20."""
    return "".join(filter(str.isalnum, name.lower()))


def loss_verdicts(rows: pd.DataFrame, algorithms: Sequence[str] = PROMISING) -> "pd.Series[Any]":
    """Judge, for each row of some algorithms, whether the mean test loss is at most the dense network's.

    ``rows``: with ``algorithm``, ``params_kept`` and the mean ``change_test_loss``.
    ``algorithms``: the verdict on every other row is None.
    """
    found = [_loss_verdict(row) if row["algorithm"] in algorithms else None for _, row in rows.iterrows()]
    return pd.Series(found, index=rows.index, dtype=object)


def _loss_verdict(row: "pd.Series[Any]") -> Verdict:
    if row["params_kept"] >= 1:
        return Verdict(Word.OPEN, "nothing was factored")
    return judged(bool(row["change_test_loss"] <= 0))


def lossless_claim(ours: pd.DataFrame, drop: float) -> Verdict:
    """Judge whether the test loss stays at or below the original's when at least ``drop`` of the parameters is removed.

    The reading favours the claim: one row that meets it is enough, although that row is then selected by test loss.

    ``ours``: rows of one model, with ``method``, ``params_kept`` and the mean ``change_test_loss``. A column ``error``,
        where there is one, holds the standard error of that change, for the reason.
    ``drop``: share of parameters removed.
    """
    if ours.empty:
        return Verdict(Word.OPEN, "no run of this model family")
    rows = ours.assign(drop=1 - ours["params_kept"])
    enough = rows[rows["drop"] >= drop]
    met = enough[enough["change_test_loss"] <= 0]
    if len(met):
        return judged(True, _row_said(met.iloc[int(met["change_test_loss"].argmin())]))
    kept = rows[(rows["change_test_loss"] <= 0) & (rows["drop"] > 0)]
    most = _row_said(kept.iloc[int(kept["drop"].argmax())]) if len(kept) else "none"
    there = (
        _row_said(enough.iloc[int(enough["change_test_loss"].argmin())]) if len(enough) else "none of ours goes so far"
    )
    said = f"lowest loss at a drop of {100 * drop:.0f} % or more: {there}"
    return judged(False, f"{said}; largest drop with the loss not above the original's: {most}")


def _row_said(row: "pd.Series[Any]") -> str:
    error = f" ± {row['error']:.4f}" if "error" in row else ""
    return f"{number(float(row['change_test_loss']), 4, True)}{error} at {100 * row['drop']:.1f} % ({row['method']})"
