"""Figure 4: accuracy and loss against parameters and MACs kept, one curve per selector, without fine-tuning."""

import sys
from collections.abc import Sequence
from pathlib import Path

import figure4_drawing as drawing
import figure4_excerpts as excerpts
import pandas as pd

from spectrim.report import averages, claims, command, compare, frame, frontier, paired, table
from spectrim.report.claims import Claim
from spectrim.report.command import Options
from spectrim.report.frontier import NEAR
from spectrim.report.table import Column, Table, number

PUBLISHED = Path(__file__).with_name("published.csv")
NETWORK = ("resnet20", "cifar10")  # of the figure; figures of their own show all
# The line that is drawn strongest and compared with its rivals: the first of these that there is.
BEST = ("joint, pivoted, by the loss", "joint, pivoted")
HIDDEN = (*frontier.KEYS, "best")
COLUMNS = (
    Column("model", "model"),
    Column("variant", "selector"),
    Column("decomposer", "decomposition"),
    Column("asked", "requested"),
    Column("params_kept", "params kept %", 1, scale=100),
    Column("macs_kept", "MACs kept %", 1, scale=100),
    Column("test_accuracy", "top-1 %", 2, scale=100),
    Column("change_test_accuracy_pp", "Δ top-1 pp", 2, signed=True),
    Column("test_loss", "test loss", 4),
    Column("change_test_loss", "Δ test loss", 4, signed=True),
    Column("published", "published Δ top-1 pp (ALDS)", 2, signed=True),
    Column("verdict", "as published"),
    Column("n", "n"),
)
NOTES = (
    averages.NOTE,
    "Δ = compressed − dense. Shares count the whole model. There is no fine-tuning, and no selector sees the test "
    "split. BatchNorm statistics are estimated again after the compression, without labels, unless a row says that "
    "they are kept. A refit fits the factors to the outputs of the dense layers, without labels, and moves the "
    "BatchNorm means. By the loss: in its refit an error of an output counts as much as the loss feels it, by K-FAC's "
    "Fisher information; otherwise all outputs of a layer count alike. "
    f"The panels of accuracy end {100 * drawing.DEEPEST:.0f} points below the dense network. Pictures of all networks "
    "show budgets, and the selectors that several networks have.",
    "Pivoted: rows of each matrix and the coefficients of its other rows, the same map in fewer numbers. In "
    "convolutions that saves no multiplication, so at equal parameters the rank, and with it the MACs, are higher.",
    "Loss verified: the fewest parameters whose rise of the loss is certainly within the request. Certain means that "
    "the mean change plus two standard errors is below it, on a verification split that no gradient reads.",
    "ALDS: Liebenwein et al., arXiv 2107.11442, with its numbers as digitised in BALF, arXiv 2509.25136, whose "
    "allocation is the knapsack. ASVD: arXiv 2312.05821.",
)


def build(options: Options) -> list[Path]:
    """Draw the frontier of one network and of all, and build the table of every number."""
    found = command.load(options)
    published = claims.claims(compare.read_published(PUBLISHED), ["Not retrained"])
    points = frontier.points(options, found)
    rows = frontier.rows(points, published)
    rows["best"] = rows["line"] == _best(rows)
    origin = command.origin(options, found, [PUBLISHED])
    models = sorted(dict.fromkeys(rows["model"]), key=frame.model_key)
    main = rows[(rows["network"] == NETWORK[0]) & (rows["data"] == NETWORK[1])]
    main = main if len(main) else rows[rows["model"] == models[0]]
    pictures = drawing.draw_main(main, options, origin)
    for measure in drawing.MEASURES:
        for share in drawing.SHARES:
            pictures += drawing.draw_all(rows, measure, share, options, origin)
    beside = {model: _beside_rivals(points, rows[rows["model"] == model]) for model in models}
    caption = f"Numbers of Figure 4: accuracy and loss without fine-tuning on {frame.data_of(rows)}"
    notes = [*NOTES, _images(points), *(f"{model}: {note}" for model, own in beside.items() for note in _compared(own))]
    notes += [*_published_note(published), *(_note(rows[rows["model"] == model]) for model in models)]
    shown = Table(options.name, rows, COLUMNS, caption, [note for note in notes if note], "model", HIDDEN)
    tables = [shown, excerpts.by_size(options.name, main, _compared(beside[main["model"].iloc[0]]))]
    if len(models) > 1:
        tables.append(excerpts.by_network(options.name, rows, beside))
    return pictures + table.save(tables, options.out, origin)


def _beside_rivals(points: pd.DataFrame, main: pd.DataFrame) -> pd.DataFrame:
    """Return the best line of the figure beside its best rival, a row per size: both names and the difference.

    Rivals with the same kind of factors are compared.
    """
    own = points[(points["network"] == main["network"].iloc[0]) & (points["data"] == main["data"].iloc[0])]
    own, line = own[own["target"] == "params_kept"], _best(main)
    rivals = own[(own["curve"] != "joint") & own["pivoted"] | (own["line"] == line)]
    found = []
    for size, there in rivals.groupby("requested", sort=False):
        best = there[there["line"] == line]["variant"]
        beside = paired.with_best_rival(there, "variant", best.iloc[0], excerpts.CHANGE) if len(best) else None
        if beside:
            found.append({"line": line, "size": size, "rival": beside[0], "difference": beside[1]})
    return pd.DataFrame(found)


def _compared(beside: pd.DataFrame) -> list[str]:
    """Return a note: the difference to the best rival at each size, with its p-value; nothing without a rival."""
    if beside.empty:
        return []
    there = beside.to_dict(orient="records")
    said = "; ".join(f"{one['difference']} at {100 * one['size']:g} %" for one in there)
    rivals = "; ".join(dict.fromkeys(beside["rival"]))
    pairs = ", ".join(dict.fromkeys(f"{one.pairs}" for one in beside["difference"]))
    ours = drawing.SHOWN[beside["line"].iloc[0]]
    return [f"{ours}, minus its best rival, {paired.TEST}: {said}. Rival: {rivals}; pairs: {pairs}."]


def _best(rows: pd.DataFrame) -> str | None:
    """Return the first line of ``BEST`` in ``rows``; None without any."""
    return next((line for line in BEST if (rows["line"] == line).any()), None)


def _images(points: pd.DataFrame) -> str:
    """Return a note: how many calibration images most selectors have, and which have another number on a network."""
    images = points["settings"].map(lambda given: given.get("data.calibration_size"))
    images = images[points["curve"] != "verified"].dropna().astype(int)
    if images.empty:
        return ""
    usual = images.mode()[0]
    others = points.loc[images.index][images != usual].assign(images=images).groupby(["images", "variant"], sort=False)
    said = [f"{size} for {name} on {', '.join(dict.fromkeys(own['network']))}" for (size, name), own in others]
    return "; ".join([f"Calibration images: {usual}", *said]) + "."


def _published_note(points: Sequence[Claim]) -> list[str]:
    """Return the note on the published points and their dense accuracy; nothing if there are none."""
    if not points:
        return []
    dense = sorted({point.values["original_top1_percent"] for point in points})
    said = f"a {points[0].model} of another training, {' or '.join(map(str, dense))} % dense"
    return [
        f"Published: ALDS without retraining, {said}. Its change of accuracy stands in the rows within {100 * NEAR:g} "
        "% of its size. The verdict is on ALDS with BatchNorm kept."
    ]


def _note(rows: pd.DataFrame) -> str:
    """Return, for one model, the accuracy of joint selection beside that published for ALDS at the same sizes."""
    ours = rows[(rows["line"] == "joint") & rows["published"].notna()]
    if ours.empty:
        return ""
    said = [
        f"{number(row['change_test_accuracy_pp'], 2, True)} against {number(row['published'], 2, True)} pp at "
        f"{100 * row['params_kept']:.1f} %"
        for _, row in ours.iterrows()
    ]
    return f"{ours['model'].iloc[0]}, joint against ALDS as published, top-1: {'; '.join(said)}."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script. Return its exit status."""
    return command.run(build, "figure4", "figure4", arguments)


if __name__ == "__main__":
    sys.exit(main())
