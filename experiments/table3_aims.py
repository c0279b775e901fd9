"""The lines of Table 3 that judge this project's aims for language models, and compare rivals of the same form."""

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from spectrim.report import paired
from spectrim.report.table import number

AIMED, HALF, POINTS = 0.8, 0.5, 0.2  # parameters kept; part of the rise of whitened SVD; percentage points
# By parameters kept: the perplexity aimed at on reviews and on speeches; None: the dense model's.
PERPLEXITIES = {0.9: None, 0.8: (62.0, 45.0), 0.7: (85.0, 70.0)}
PIVOTED = (
    "joint_pivoted",
    "refitted_pivoted",
    "two_sided_pivoted",
    "two_sided_refitted_pivoted",
    "two_sided_embedding_pivoted",
)
# The same selection on other texts, or with the embedding, beside the plainest one.
VARIED = {
    f"two_sided_{change}_pivoted": "two_sided_pivoted"
    for change in ("own_text", "less_text", "more_text", "more_text_auto", "embedding")
}
RIVALS = ("whitened_pivoted", "knapsack_pivoted", "svdllmv2_pivoted", "zerosum_pivoted", "lems_pivoted")
ERRORS = 2.0  # standard errors of a difference, above which it is no tie


def said(rows: pd.DataFrame, runs: pd.DataFrame, others: Sequence[str], kinds: Mapping[str, str]) -> list[str]:
    """Return all lines, one a judgement.

    ``rows``, ``runs``: of the table, means and single runs. ``others``: the corpora that calibration is not drawn from.
    ``kinds``: what the table calls each kind of selection.
    """
    pairs = [*product(PIVOTED, RIVALS), *VARIED.items()]
    return [*_half(rows, others), *_perplexities(rows, others, kinds), *_paired(runs, others, kinds, pairs)]


def _half(rows: pd.DataFrame, others: Sequence[str]) -> list[str]:
    """Judge each model and joint selection at ``AIMED`` of the parameters.

    The aim for a classifier is an accuracy within ``POINTS`` of the dense model's. For a language model it is at most
    ``HALF`` of the rise of the perplexity that whitened SVD at a uniform ratio causes.
    """
    lines = []
    sized = rows[rows["requested"] == AIMED]
    for _, ours in sized[sized["kind"].isin(["joint", "refitted", *PIVOTED])].iterrows():
        net, name = ours["net"], ours["method"].removesuffix(f", {100 * AIMED:g} % of the parameters")
        whitened = sized[(sized["net"] == net) & (sized["kind"] == "whitened") & ~sized["embedding"].astype(bool)]
        if not math.isnan(ours["test_accuracy"]):
            word = "met" if ours["change_test_accuracy_pp"] >= -POINTS else "not met"
            change = number(ours["change_test_accuracy_pp"], 2, True)
            aim = f"the aim, within {POINTS:g} pp of dense at {100 * AIMED:g} %"
            lines.append(f"{net}: {aim}, is {word}: {change} pp ({name}).")
        elif len(whitened) and ours["kind"] not in PIVOTED:  # which have aims and rivals of their own
            rises: Any = whitened.iloc[0]
            part = ours["rise"] / rises["rise"]
            word = "met" if part <= HALF else "not met"
            parts = (f", {ours[f'rise_{other}'] / rises[f'rise_{other}']:.2f} on {other}" for other in others)
            aim = f"at {100 * AIMED:g} % at most {HALF:g} of the rise of whitened SVD at a uniform ratio"
            lines.append(f"{net}: the aim, {aim}, is {word}: {part:.2f}{''.join(parts)} ({name}).")
    return lines


def _perplexities(rows: pd.DataFrame, others: Sequence[str], kinds: Mapping[str, str]) -> list[str]:
    """Judge each pivoted joint selection of a decoder by the perplexities aimed at; none without a second corpus."""
    lines: list[str] = []
    decoders = rows["kind"].isin([*PIVOTED, *VARIED]) & rows["perplexity"].notna() & bool(others)
    decoders &= rows["requested"].isin(PERPLEXITIES)
    for _, row in rows[decoders].iterrows():
        dense = rows[(rows["net"] == row["net"]) & (rows["algorithm"] == "dense")].iloc[0]
        columns = ["perplexity", *(f"perplexity_{other}" for other in others[:1])]
        bounds = PERPLEXITIES[row["requested"]] or [dense[column] for column in columns]
        found = [row[column] for column in columns]
        word = "met" if all(one <= most for one, most in zip(found, bounds, strict=True)) else "not met"
        wanted, reached = (" and ".join(f"{one:.1f}" for one in own) for own in (bounds, found))
        aim = f"the aim at {100 * row['requested']:g} %, perplexities of at most {wanted}"
        lines.append(f"{row['net']}: {aim}, is {word}: {reached} ({kinds[row['kind']]}).")
    return lines


def _paired(
    runs: pd.DataFrame, others: Sequence[str], kinds: Mapping[str, str], pairs: Sequence[tuple[str, str]]
) -> list[str]:
    """Compare the losses of joint selection with those of each rival of the same form, size by size.

    ``pairs``: kinds of a selection and of its rival.
    """
    lines = []
    pivoted = runs[runs["kind"].isin([kind for pair in pairs for kind in pair])]
    pivoted = pivoted.assign(**{f"loss_{other}": np.log(pivoted[f"perplexity_{other}"]) for other in others})
    for _, own in pivoted.groupby(["model", "data", "requested", "embedding"], sort=False):
        net = f"{own['model'].iloc[0]}, {own['data'].iloc[0]} at {100 * own['requested'].iloc[0]:g} %"
        for kind, rival in pairs:
            both = own[own["kind"] == kind], own[own["kind"] == rival]
            found = paired.difference(*both, "test_loss")
            if found is None:
                continue
            said = f"{_verdict(found)} {kinds[rival]}: {number(found.mean, 4, True)} nats{_error(found)}"
            for other in others:
                beside = paired.difference(*both, f"loss_{other}")
                if beside is not None and not math.isnan(beside.mean):
                    change = f"{number(beside.mean, 4, True)} nats{_error(beside)}"
                    said += f"; on {other} it {_verdict(beside)} the rival: {change}"
            lines.append(f"{net}: {kinds[kind]}, {said}.")
    return lines


def _verdict(found: paired.Paired) -> str:
    """Return whether a difference of losses is beyond chance. A single draw tells its sign only."""
    if found.pairs > 1 and abs(found.mean) <= ERRORS * found.std / math.sqrt(found.pairs):
        return "is level with"
    return "is ahead of" if found.mean < 0 else "is behind"


def _error(found: paired.Paired) -> str:
    if found.pairs < 2:
        return ", one calibration draw, so without a standard error"
    return f", standard error {found.std / math.sqrt(found.pairs):.4f}, {found.pairs} calibration draws"
