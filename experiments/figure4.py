"""Figure 4: accuracy and loss against parameters and MACs kept, one curve per selector, without fine-tuning."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb

from spectrim.report import averages, claims, command, compare, figure, frame, frontier, paired, table
from spectrim.report.claims import Claim
from spectrim.report.command import Options
from spectrim.report.frontier import CURVES, NEAR
from spectrim.report.table import Column, Table, number

PUBLISHED = Path(__file__).with_name("published.csv")
# The figure shows one network and joint selection with its strongest rivals. Figures of their own show the rest.
NETWORK = ("resnet20", "cifar10")
SHOWN = {
    "joint": "joint selection (ours)",
    "joint, pivoted": "joint, pivoted (ours)",
    "joint, pivoted, by the loss": "joint, by the loss (ours)",
    "refitted, pivoted": "knapsack, pivoted, refit",
    "refitted, pivoted, by the loss": "knapsack, refit by the loss",
    "refitted": "knapsack with our refit",
    "knapsack": "knapsack (BALF)",
    "sensitivity": "sensitivity (ASVD)",
    "aimet": "greedy (AIMET)",
}
# The line that is drawn strongest: the first of these that a network has.
BEST, BEST_COLOUR = ("joint, pivoted, by the loss", "joint, pivoted"), "#A50026"
UNITS = {"params_kept": "parameters", "macs_kept": "MACs"}
SHARES = {share: f"{unit} kept (%)" for share, unit in UNITS.items()}
MEASURES = {"accuracy": ("test_accuracy", 100), "loss": ("test_loss", 1)}
SIZES = (0.826, 0.7, 0.5, 0.4, 0.3)  # shares of the parameters, the columns of the excerpt
AT_MOST_OFF = 0.02  # share of the parameters: how near a row must be to a column
DEEPEST = 0.2  # accuracy below the dense network's at which a panel ends; the table has all points
LEAST = 0.05  # accuracy that a panel spans at least, so that a change of nothing looks like it
HIDDEN = (*frontier.KEYS, "best")
ROOM = 1  # percentage points of accuracy above the highest value of a panel
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
    f"The panels of accuracy end {100 * DEEPEST:.0f} points below the dense network.",
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
    pictures = _draw_main(main, options, origin)
    for measure in MEASURES:
        for share in SHARES:
            pictures += _draw_all(rows, published, measure, share, options, origin)
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
    own = points[(points["target"] == "params_kept") & points["line"].isin(SHOWN)]
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
    ours = f"{SHOWN[str(line)]}, minus its best rival, {paired.TEST}"
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


def _draw_main(rows: pd.DataFrame, options: Options, origin: dict[str, Any]) -> list[Path]:
    """Draw the change of accuracy over the parameters kept, with the name of each curve at its end."""
    better = {line.removesuffix(frame.BY_LOSS) for line in rows["line"].dropna() if line.endswith(frame.BY_LOSS)}
    shown = rows[rows["line"].isin(SHOWN.keys() - better)]  # the table has the same lines with the other refit
    with figure.panels(1, 1, 3.6, _title(shown, *rows.iloc[0][["network", "data"]])) as (canvas, (axis,)):
        axis.axhline(0, color=figure.DENSE.colour, linewidth=1)
        ends = []
        for key, own in shown.sort_values("params_kept").groupby("line", sort=False):
            _errorbar(axis, own, "params_kept", "change_test_accuracy_pp", 1, -math.inf)
            last = own.iloc[0]
            ends.append((100 * last["params_kept"], last["change_test_accuracy_pp"], SHOWN[str(key)], _colour(last)))
        figure.label_ends(axis, ends)
        axis.annotate("dense", (100, 0), xytext=(2, 0), textcoords="offset points", va="center")
        axis.set(xlabel=SHARES["params_kept"], ylabel="change of test accuracy (points)", xlim=(0, 100))
        axis.set_xticks(range(30, 101, 10))
        return figure.save(canvas, options.name, options.out, origin)


def _title(shown: pd.DataFrame, network: str, data: str) -> str:
    """Return the message: the accuracy that joint selection and its best rival lose at the smallest size of both."""
    sized = shown[shown["target"] == "params_kept"]
    ours, others = sized[sized["curve"] == "joint"], sized[sized["curve"] != "joint"]
    common = set(ours["requested"]) & set(others["requested"])
    if not common:
        return f"{network} on {data}: change of accuracy without fine-tuning, by parameters kept"
    size = min(common)
    there = [own[own["requested"] == size]["change_test_accuracy_pp"] for own in (ours, others)]
    lost, rival = (number(-float(changes.max()), 1) for changes in there)
    return (
        f"{network} on {data} with {100 * size:g} % of its parameters: joint selection loses {lost} points of accuracy "
        f"without fine-tuning, its best rival {rival}"
    )


def _draw_all(
    rows: pd.DataFrame,
    published: Sequence[Claim],
    measure: str,
    share: str,
    options: Options,
    origin: dict[str, Any],
) -> list[Path]:
    """Draw one measure of every selector over one share, one panel per model."""
    value, scale = MEASURES[measure]
    models = sorted(dict.fromkeys(rows["model"]), key=frame.model_key)
    with figure.panels(
        len(models), 3, 2.7, message(rows, measure, share), share="y" if measure == "loss" else "none"
    ) as (canvas, axes):
        for model, axis in zip(models, axes, strict=True):
            own = rows[rows["model"] == model]
            dense = float(own[value].iloc[0])
            axis.axhline(scale * dense, color=figure.DENSE.colour, linewidth=1, label=figure.DENSE.name)
            lowest = 0.9 * dense if measure == "loss" else 0.0
            for _, curve in own.dropna(subset="curve").groupby("line", sort=False):
                _errorbar(axis, curve.sort_values(share), share, value, scale, lowest)
            axis.set(title=model, xlabel=SHARES[share])
            if measure == "accuracy":
                if share == "params_kept":
                    _draw_published(axis, frontier.of(published, own))
                _limit(axis, dense)
        if measure == "loss":
            figure.losses(axes)
        else:
            for axis in axes[::3]:
                axis.set_ylabel("top-1 (%)")
        figure.legend(canvas, axes)
        return figure.save(canvas, f"{options.name}_{measure}_{UNITS[share].lower()}", options.out, origin)


def message(rows: pd.DataFrame, measure: str, share: str) -> str:
    """Return the message: at how many sizes of joint selection no rival that is as small is better.

    Rivals with the same kind of factors are compared, but none with the better kind of refit. A size that none of them
    reaches does not count.
    """
    value, _ = MEASURES[measure]
    met = sizes = 0
    for _, own in rows.groupby("model", sort=False):
        others = own[~own["curve"].isin(["joint", "verified"]) & (own["algorithm"] != "dense")]
        for _, ours in own[own["curve"] == "joint"].iterrows():
            alike = others[(others["pivoted"] == ours["pivoted"]) & (others["by_loss"] <= ours["by_loss"])]
            small = alike[alike[share] <= ours[share]][value]
            if len(small):
                met += not ((small > ours[value]) if measure == "accuracy" else (small < ours[value])).any()
                sizes += 1
    if not sizes:
        return f"Test {measure} of every selector by {UNITS[share]} kept, without fine-tuning"
    better = {"accuracy": "is more accurate", "loss": "has a lower loss"}[measure]
    rivals = f"no rival with the same kind of factors and refit, and as few {UNITS[share]},"
    return f"At {met} of {sizes} sizes, {rivals} {better} than joint selection"


def _errorbar(axis: Axes, own: pd.DataFrame, share: str, value: str, scale: float, lowest: float) -> None:
    """Draw one curve with its standard deviations.

    A curve with BatchNorm kept is dotted. One of pivoted factors is dashed, with hollow markers. The best curve is
    thick and whole, and lies above the others.

    ``lowest``: no bar of the value reaches below it.
    """
    first = own.iloc[0]
    best = first["best"]
    hollow = first["pivoted"] and not best
    axis.errorbar(
        100 * own[share],
        scale * own[value],
        xerr=100 * own[f"{share}_std"].fillna(0.0),
        yerr=scale * figure.bars(own, value, lowest),
        color=_colour(first),
        marker=CURVES[first["curve"]].marker,
        markerfacecolor="white" if hollow else None,
        linestyle=":" if first["kept"] else "--" if hollow else "-",
        linewidth=2.2 if best else 1.2,
        markersize=6 if best else 4.5,
        capsize=2,
        label=first["variant"],
        zorder=3 if best else None,
    )


def _colour(row: "pd.Series[Any]") -> str:
    """Return the colour of a curve by one of its rows: darker with BatchNorm kept, lighter with pivoted factors."""
    if row["best"]:
        return BEST_COLOUR
    kept, pivoted = bool(row["kept"]), bool(row["pivoted"]) and not row["by_loss"]
    red, green, blue = (pivoted / 2 + part / 2 ** (kept + pivoted) for part in to_rgb(CURVES[row["curve"]].colour))
    return to_hex((red, green, blue))


def _limit(axis: Axes, dense: float) -> None:
    """End a panel of accuracy ``DEEPEST`` below the dense network's, and let it span ``LEAST`` at least."""
    low = max(axis.get_ylim()[0], 100 * (dense - DEEPEST))
    axis.set_ylim(min(low, 100 * (dense - LEAST)), max(axis.dataLim.y1, 100 * dense) + ROOM)


def _draw_published(axis: Axes, points: Sequence[Claim]) -> None:
    if points:
        kept = [100 * (1 - point.drop) for point in points]
        top1 = [point.values["original_top1_percent"] + point.values["change_top1_pp"] for point in points]
        axis.plot(kept, top1, ":", color="#882255", marker="h", linewidth=1.2, markersize=5, label="ALDS, published")


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
