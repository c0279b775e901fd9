"""Figure 4: accuracy and loss against parameters and MACs kept, one curve per selector, without fine-tuning."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import figure4_drawing as drawing
import pandas as pd

from spectrim.report import averages, claims, command, compare, frame, frontier, paired, table
from spectrim.report.claims import Claim
from spectrim.report.command import Options
from spectrim.report.frontier import NEAR
from spectrim.report.table import Column, Table, number

PUBLISHED = Path(__file__).with_name("published.csv")
NETWORK = ("resnet20", "cifar10")  # of the figure; figures of their own show all
# The line that is drawn strongest: the first of these that a network has.
BEST = ("joint, pivoted, by the loss", "joint, pivoted")
SIZES = (0.826, 0.7, 0.5, 0.4, 0.3)  # shares of the parameters, the columns of the excerpt
AT_MOST_OFF = 0.02  # share of the parameters: how near a row must be to a column
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
    f"The panels of accuracy end {100 * drawing.DEEPEST:.0f} points below the dense network.",
    "Pivoted: rows of each matrix and the coefficients of its other rows, the same map in fewer numbers. In "
    "convolutions that saves no multiplication, so at equal parameters the rank, and with it the MACs, are higher.",
    "Loss verified: the fewest parameters whose rise of the loss is certainly within the request. Certain means that "
    "the mean change plus two standard errors is below it, on a verification split that no gradient reads.",
    "ALDS: Liebenwein et al., arXiv 2107.11442, with its numbers as digitised in BALF, arXiv 2509.25136, whose "
    "allocation is the knapsack. ASVD: arXiv 2312.05821.",
)


def build(options: Options) -> list[Path]:
    """Draw the frontier of one network, then every network and selector, and build the table of the same numbers."""
    found = command.load(options)
    published = claims.claims(compare.read_published(PUBLISHED), ["Not retrained"])
    points = frontier.points(options, found)
    rows = frontier.rows(points, published)
    rows["best"] = rows["line"] == rows["model"].map({model: _best(own) for model, own in rows.groupby("model")})
    origin = command.origin(options, found, [PUBLISHED])
    models = sorted(dict.fromkeys(rows["model"]), key=frame.model_key)
    main = rows[(rows["network"] == NETWORK[0]) & (rows["data"] == NETWORK[1])]
    main = main if len(main) else rows[rows["model"] == models[0]]
    pictures = drawing.draw_main(main, options, origin)
    for measure in drawing.MEASURES:
        for share in drawing.SHARES:
            pictures += drawing.draw_all(rows, published, measure, share, options, origin)
    beside = {model: _beside_rivals(points, rows[rows["model"] == model]) for model in models}
    caption = f"Numbers of Figure 4: accuracy and loss without fine-tuning on {frame.data_of(rows)}"
    notes = [*NOTES, *(f"{model}: {note}" for model, own in beside.items() for note in own)]
    notes += [*_published_note(published), *(_note(rows[rows["model"] == model]) for model in models)]
    shown = Table(options.name, rows, COLUMNS, caption, [note for note in notes if note], "model", HIDDEN)
    excerpt = _paper(options.name, main, beside[main["model"].iloc[0]])
    return pictures + table.save([shown, excerpt], options.out, origin)


def _beside_rivals(points: pd.DataFrame, main: pd.DataFrame) -> list[str]:
    """Return a note: the best line of the figure beside its best rival, at each size, with the p-value.

    Rivals with the same kind of factors are compared.
    """
    own = points[(points["target"] == "params_kept") & points["line"].isin(drawing.SHOWN)]
    own = own[(own["network"] == main["network"].iloc[0]) & (own["data"] == main["data"].iloc[0])]
    line = _best(main)
    rivals = own[(own["curve"] != "joint") & own["pivoted"] | (own["line"] == line)]
    said, others, pairs = [], [], []
    for size, there in rivals.groupby("requested", sort=False):
        best = there[there["line"] == line]["variant"]
        found = paired.with_best_rival(there, "variant", best.iloc[0], "change_test_accuracy_pp") if len(best) else None
        if found:
            said.append(f"{found[1]} at {100 * float(str(size)):g} %")
            others.append(found[0])
            pairs.append(f"{found[1].pairs}")
    if not said:
        return []
    rival, count = "; ".join(dict.fromkeys(others)), ", ".join(dict.fromkeys(pairs))
    ours = f"{drawing.SHOWN[str(line)]}, minus its best rival, {paired.TEST}"
    return [f"{ours}: {'; '.join(said)}. Rival: {rival}; pairs: {count}."]


def _best(rows: pd.DataFrame) -> str | None:
    """Return the line of one network that is drawn strongest; None without any."""
    return next((line for line in BEST if (rows["line"] == line).any()), None)


def _paper(name: str, rows: pd.DataFrame, beside: Sequence[str]) -> Table:
    """Return the change of accuracy of one network as an excerpt: a row per selector, a column per size."""
    lines: dict[str, dict[str, Any]] = {}
    for row in rows[rows["curve"].notna() & (rows["curve"] != "verified")].to_dict(orient="records"):
        near = [size for size in SIZES if abs(row["params_kept"] - size) <= AT_MOST_OFF]
        for size in near[:1]:
            line = lines.setdefault(row["variant"], {"variant": row["variant"]})
            for tail in ("", "_std"):
                line[f"{size:g}{tail}"] = row[f"change_test_accuracy_pp{tail}"]
    keys = [f"{size:g}{tail}" for size in SIZES for tail in ("", "_std")]
    data = pd.DataFrame(list(lines.values())).reindex(columns=["variant", *keys])
    columns = [Column("variant", "Δ top-1 (points) at")]
    columns += [Column(f"{size:g}", f"{100 * size:g} %", 2, signed=True) for size in SIZES]
    network, on = rows[["network", "data"]].iloc[0]
    caption = f"Change of accuracy by parameters kept, {network} on {on}, without fine-tuning"
    notes = [
        f"A dash: no size of this selector is within {100 * AT_MOST_OFF:g} points of the column's.",
        averages.seeds_note(rows),
        *beside,
    ]
    return Table(f"{name}_paper", data, columns, caption, notes, excerpt=True)


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
