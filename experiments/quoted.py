"""Numbers that sentences of README and docs quote, each read from a committed table.

A sentence holds ``<!-- =NAME -->text<!-- = -->``; ``readme.py`` writes the number of that name between the markers.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from spectrim.errors import UserError
from spectrim.report.table import number

NETWORKS = ("resnet20", "resnet56", "resnext20", "densenet22")  # those of Table 2 without VGG-19
Rows = pd.DataFrame


def rows(results: Path, table: str, /, folder: str = "tables", **where: Any) -> Rows:
    """Return the rows of a csv with these values. Raises ``UserError`` where there are none.

    ``folder``: ``tables`` or ``benchmarks``.
    ``where``: by column, a value, or a list of values.
    """
    path = results / folder / f"{table}.csv"
    try:
        found = pd.read_csv(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    for column, value in where.items():
        if column not in found:
            raise UserError(f"{path} has no column {column}")
        found = found[found[column].isin(value if isinstance(value, list | tuple) else [value])]
    if found.empty:
        raise UserError(f"{path} has no row with {', '.join(f'{key} {value}' for key, value in where.items())}")
    return found


def span(values: "pd.Series[float]", digits: int, unit: str = "", signed: bool = False) -> str:
    """Return the lowest and the highest value, or one number if they are printed alike."""
    low, high = (number(float(value), digits, signed) for value in (values.min(), values.max()))
    return (low if low == high else f"{low} to {high}") + unit


def removed(found: Rows, digits: int = 0) -> str:
    """Return the share of the parameters that some rows remove, in percent."""
    return span(100 * (1 - found["params_kept"]), digits, " %")


def selected(results: Path, models: Any, setting: str) -> Rows:
    """Return the rows of lossless and compact selection with a setting, such as ``verified``, in Table 2."""
    return rows(results, "table2", model=models, method=[f"{name}, {setting}" for name in ("lossless", "compact")])


def whitened(results: Path) -> str:
    """Return the rise of the loss with a whitened decomposition over that without, at equal factors, in Table 4."""
    cut = rows(results, "table4", variant=["truncation, params kept 0.5", "truncation, params kept 0.75"])
    rise = cut.pivot(index=["variant", "factors"], columns="method", values="change_test_loss")
    names = ["SVD, channel view", "SVD, spatial view", "SVD, better view of each layer"]
    parts = rise[[f"whitened {name}" for name in names]].to_numpy() / rise[names].to_numpy()
    return span(pd.Series(100 * parts.ravel()), 0, " %")


def kept_loss(results: Path) -> str:
    """Return with how many decompositions the selector of Table 4 kept the loss."""
    found = rows(results, "table4").dropna(subset="verdict")
    return f"{(found['verdict'] == 'holds').sum()} of {len(found)}"


def cost(results: Path, rival: str, decomposer: str) -> float:
    """Return the CPU seconds of joint selection with pivoted factors over those of a rival, in Table 6.

    Both are those of the trained network. ``decomposer``: that of the rival.
    """
    both = (("joint, ours", "pivoted"), (rival, decomposer))
    ours, theirs = (
        rows(results, "table6", untrained=False, selector=name, decomposer=one)["cpu_seconds"].iloc[0]
        for name, one in both
    )
    return float(ours / theirs)


def tolerant(results: Path, tolerance: str, model: Any = None, factors: str = "") -> Rows:
    """Return the rows of joint selection with a tolerance of the loss, in Figure 4.

    ``factors``: empty for plain ones, or ``, pivoted``.
    """
    variant = f"joint, ours, loss verified{factors}"
    where: dict[str, Any] = {"variant": variant, "asked": f"max loss increase {tolerance}"}
    return rows(results, "figure4", **where, **({} if model is None else {"model": model}))


def tolerant_macs(results: Path, factors: str = "") -> str:
    """Return the part of the MACs that a tolerance of 0.01 nats keeps of ResNet-20, in percent."""
    return f"{100 * tolerant(results, '0.01', 'resnet20', factors)['macs_kept'].iloc[0]:.0f} %"


def within(results: Path) -> str:
    """Return how many networks stay within a tolerance of 0.01 nats on the test images."""
    found = tolerant(results, "0.01")
    return f"{(found['change_test_loss'] <= 0.01).sum()} of {len(found)}"


def untouched(results: Path) -> str:
    """Return how many networks a tolerance of zero leaves as they are."""
    found = tolerant(results, "0")
    return f"{(found['params_kept'] == 1).sum()} of {len(found)}"


def at(results: Path, model: str, variant: str, share: str) -> Any:
    """Return one row of Figure 4 at a requested share of the parameters."""
    return rows(results, "figure4", model=model, variant=variant, asked=f"params kept {share}").iloc[0]


def points(row: Any) -> str:
    """Return the change of accuracy of a row in points."""
    return number(row["change_test_accuracy_pp"], 2, True)


def macs(results: Path, variant: str, model: str = "resnet20", share: str = "0.5") -> str:
    """Return the part of the MACs that a selector keeps of a network at a share of its parameters, in percent."""
    return f"{100 * at(results, model, variant, share)['macs_kept']:.0f} %"


def lead_p(results: Path) -> str:
    """Return the least and the largest p-value of joint selection's lead below the excerpt of Figure 4."""
    note = (results / "tables/figure4_paper.md").read_text(encoding="utf-8")
    found = sorted(re.findall(r"\(p = ([\d.]+)\)", note), key=float)
    return f"{found[0]} to {found[-1]}"


def smollm2(results: Path, corpus: str, kept: int = 90, embedding: str = "") -> str:
    """Return a perplexity of SmolLM2 in Table 3 where ``kept`` % of the parameters are; of the dense model at 100.

    ``embedding``: ", embedding too" where it is factored.
    """
    method = (
        f"joint, ours, both sides whitened{embedding}, pivoted, {kept} % of the parameters" if kept < 100 else "dense"
    )
    return number(float(rows(results, "table3", model="smollm2", method=method)[corpus].iloc[0]), 2)


def pivoted_time(results: Path) -> str:
    """Return by how much a pivoted convolution is slower than a plain one at batch size 1, at most, in percent."""
    found = rows(results, "pivoted", "benchmarks", view=["channel", "spatial"], batch=1)
    return f"{100 * (found['time_ratio'].max() - 1):.0f} %"


def refined(results: Path, done: str, selector: str = "joint, ours") -> str:
    """Return the change of accuracy of a selector at 30 %, with refinement or without, in Table 11."""
    found = rows(results, "table11", model="resnet20 on cifar10", method=f"{selector}, 0.3, {done}")
    return points(found.iloc[0])


def own_weights(results: Path) -> Any:
    """Return the row of Table 12 on which ResNet-50 is smallest with a loss not above the dense one's."""
    found = rows(results, "table12", model="resnet50", verdict="holds")
    return found.iloc[int(found["params_kept"].argmin())]


def own_weights_published(results: Path) -> str:
    """Return the lowest rise of the loss of ResNet-50 in Table 12 at S1b's drop or more, in nats."""
    found = rows(results, "table12", model="resnet50")
    return number(float(found.loc[found["params_kept"] <= 0.441, "change_test_loss"].min()), 2, True)


def trained(results: Path, net: str, methods: Any, epochs: int | None = None) -> Rows:
    """Return the rows of Table 5 for a network and methods."""
    where: dict[str, Any] = {"net": net, "method": methods} | ({} if epochs is None else {"epochs": epochs})
    return rows(results, "table5", **where)


def svd_trained(results: Path, net: str, settings: list[str], epochs: int | None = None) -> Rows:
    """Return the rows of SVD training from a trained network in Table 5."""
    return trained(results, net, [f"SVD training from a trained net, {one}" for one in settings], epochs)


def fine_tuned(results: Path, net: str, share: str, tail: str = "") -> Any:
    """Return the row of Table 5 of one threshold over all layers with fine-tuning after it."""
    return trained(results, net, f"global threshold, params kept {share}, then fine-tuned{tail}").iloc[0]


PIVOTED, REFITTED = "joint, ours, pivoted", "knapsack (BALF), refitted as ours, pivoted"
BY_LOSS, RIVAL = (f"{name}, by the loss" for name in (PIVOTED, REFITTED))
LENET, RESNET, VGG = "lenet5, mnist", "resnet20, cifar10", "vgg19_half, cifar10"
SIX_CUTS = ["hoyer 0.01, ε 0.1, 6 cuts", "none, ε 0.1, 6 cuts", "nuclear 0.001, ε 0.1, 6 cuts"]
PRICED = "hoyer 0.005, ε 0.06, 4 cuts, priced, spatial"
VGG_CUTS = [f"{one}, ε 0.03, 3 cuts, priced, spatial" for one in ("hoyer 0.01", "none", "nuclear 0.001")]


def change(found: Rows) -> str:
    """Return the change of accuracy of some rows of Table 5, in points."""
    return span(found["change_pp"], 2, signed=True)


def epochs(results: Path) -> str:
    """Return the epochs of training after a cut, in Table 1."""
    found = rows(results, "table1_sizes", scratch=False)
    return span(found.loc[found["epochs"] > 0, "epochs"], 0)


NUMBERS: dict[str, Callable[[Path], str]] = {
    "vgg_stated": lambda results: removed(selected(results, "vgg19_half", "one-shot, gamma 0.008")),
    "others_stated": lambda results: removed(selected(results, NETWORKS, "one-shot, gamma 0.008"), 1),
    "others_wide": lambda results: removed(selected(results, NETWORKS, "one-shot, gamma 0.03")),
    "others_wide_loss": lambda results: number(
        float(selected(results, NETWORKS, "one-shot, gamma 0.03")["change_test_loss"].abs().max()), 4
    ),
    "vgg_verified": lambda results: removed(selected(results, "vgg19_half", "verified")),
    "densenet_verified": lambda results: removed(selected(results, "densenet22", "verified")),
    "whitened": whitened,
    "kept_loss": kept_loss,
    "vgg_joint_30": lambda results: points(at(results, "vgg19_half", PIVOTED, "0.3")),
    "vgg_knapsack_30": lambda results: points(at(results, "vgg19_half", REFITTED, "0.3")),
    "vgg_joint_macs": lambda results: macs(results, PIVOTED, "vgg19_half", "0.3"),
    "vgg_knapsack_macs": lambda results: macs(results, REFITTED, "vgg19_half", "0.3"),
    "resnext_joint_50": lambda results: points(at(results, "resnext20", BY_LOSS, "0.5")),
    "resnext_knapsack_50": lambda results: points(at(results, "resnext20", RIVAL, "0.5")),
    "resnext_joint_30": lambda results: points(at(results, "resnext20", BY_LOSS, "0.3")),
    "resnext_knapsack_30": lambda results: points(at(results, "resnext20", RIVAL, "0.3")),
    "cct_joint_50": lambda results: points(at(results, "cct2", BY_LOSS, "0.5")),
    "cct_knapsack_50": lambda results: points(at(results, "cct2", RIVAL, "0.5")),
    "cct_joint_30": lambda results: points(at(results, "cct2", BY_LOSS, "0.3")),
    "cct_knapsack_30": lambda results: points(at(results, "cct2", RIVAL, "0.3")),
    "cct_energy_30": lambda results: points(at(results, "cct2", "energy truncation, pivoted", "0.3")),
    "cct_sensitivity_30": lambda results: points(at(results, "cct2", "sensitivity (ASVD), pivoted", "0.3")),
    "cct_macs": lambda results: macs(results, BY_LOSS, "cct2"),
    "cct_knapsack_macs": lambda results: macs(results, RIVAL, "cct2"),
    "cct_equal_30": lambda results: points(at(results, "cct2", PIVOTED, "0.3")),
    "resnext_equal_30": lambda results: points(at(results, "resnext20", PIVOTED, "0.3")),
    "cct_stated": lambda results: removed(selected(results, "cct2", "one-shot, gamma 0.008"), 1),
    "cct_wide": lambda results: removed(selected(results, "cct2", "one-shot, gamma 0.03")),
    "cct_verified": lambda results: removed(selected(results, "cct2", "verified")),
    "plain_macs": lambda results: macs(results, "joint, ours"),
    "pivoted_macs": lambda results: macs(results, PIVOTED),
    "pivoted_macs_83": lambda results: macs(results, PIVOTED, share="0.826"),
    "lead_p": lead_p,
    "refit_p": lambda results: number(float(rows(results, "table9", method="no refit")["to_default_p"].iloc[0]), 3),
    "smollm2_reviews": lambda results: smollm2(results, "perplexity"),
    "smollm2_reviews_dense": lambda results: smollm2(results, "perplexity", 100),
    "smollm2_speeches": lambda results: smollm2(results, "perplexity_sotu"),
    "smollm2_speeches_dense": lambda results: smollm2(results, "perplexity_sotu", 100),
    **{
        f"smollm2_{name}_{kept}{key}": partial(smollm2, corpus=corpus, kept=kept, embedding=embedding)
        for kept in (80, 70)
        for name, corpus in (("reviews", "perplexity"), ("speeches", "perplexity_sotu"))
        for key, embedding in (("", ""), ("_embedding", ", embedding too"))
    },
    "pivoted_time": pivoted_time,
    "own_weights_drop": lambda results: f"{100 * (1 - own_weights(results)['params_kept']):.0f} %",
    "own_weights_change": lambda results: number(float(own_weights(results)["change_test_loss"]), 2, True),
    "own_weights_error": lambda results: number(float(own_weights(results)["error"]), 2),
    "own_weights_same": lambda results: f"{100 * own_weights(results)['same_answer']:.0f} %",
    "own_weights_published": own_weights_published,
    "refined_30": lambda results: refined(results, "yes"),
    "unrefined_30": lambda results: refined(results, "no"),
    "refined_knapsack_30": lambda results: refined(results, "yes", "knapsack (BALF), refitted as ours"),
    "cost_aimet": lambda results: f"{100 * cost(results, 'AIMET, greedy', 'svd_spatial'):.1f} %",
    "cost_knapsack": lambda results: number(cost(results, "knapsack (BALF)", "pivoted"), 1),
    "tolerant_resnet20": lambda results: removed(tolerant(results, "0.01", "resnet20")),
    "tolerant_pivoted": lambda results: removed(tolerant(results, "0.01", "resnet20", ", pivoted")),
    "tolerant_pivoted_loss": lambda results: number(
        float(tolerant(results, "0.01", "resnet20", ", pivoted")["change_test_loss"].iloc[0]), 4, True
    ),
    "tolerant_pivoted_macs": lambda results: tolerant_macs(results, ", pivoted"),
    "tolerant_macs": tolerant_macs,
    "tolerant_resnet56": lambda results: removed(tolerant(results, "0.01", "resnet56")),
    "tolerant_vgg": lambda results: removed(tolerant(results, "0.01", "vgg19_half")),
    "within": within,
    "untouched": untouched,
    "vgg_joint_50_loss": lambda results: number(
        float(at(results, "vgg19_half", "joint, ours", "0.5")["change_test_loss"]), 6, True
    ),
    "alds_kept": lambda results: points(at(results, "resnet20", "ALDS, BatchNorm kept", "0.5")),
    "alds_published": lambda results: number(
        float(at(results, "resnet20", "ALDS, BatchNorm kept", "0.5")["published"]), 2, True
    ),
    "alds_follow": lambda results: points(at(results, "resnet20", "ALDS", "0.5")),
    "epochs": epochs,
    "lenet_kept": lambda results: span(100 * svd_trained(results, LENET, SIX_CUTS)["params_kept"], 1, " %"),
    "lenet_change": lambda results: change(svd_trained(results, LENET, SIX_CUTS)),
    "lenet_rival_6": lambda results: number(fine_tuned(results, LENET, "0.06")["change_pp"], 2, True),
    "lenet_rival_3": lambda results: number(fine_tuned(results, LENET, "0.03")["change_pp"], 2, True),
    "lenet_tight": lambda results: change(svd_trained(results, LENET, ["nuclear 0.004, ε 0.2, 8 cuts"], 16)),
    "resnet_removed": lambda results: removed(svd_trained(results, RESNET, [PRICED])),
    "resnet_change": lambda results: change(svd_trained(results, RESNET, [PRICED])),
    "resnet_rival_50": lambda results: number(fine_tuned(results, RESNET, "0.5", ", spatial")["change_pp"], 2, True),
    "resnet_rival_25": lambda results: number(fine_tuned(results, RESNET, "0.25", ", spatial")["change_pp"], 2, True),
    "resnet_uncut": lambda results: change(trained(results, RESNET, "truncation, ratio 1, then fine-tuned, spatial")),
    "resnet_published": lambda results: change(trained(results, RESNET, "published: ALDS: arXiv 2107.11442")),
    "vgg_kept": lambda results: span(100 * svd_trained(results, VGG, VGG_CUTS)["params_kept"], 0, " %"),
    "vgg_change": lambda results: change(svd_trained(results, VGG, VGG_CUTS)),
    "vgg_rival": lambda results: number(fine_tuned(results, VGG, "0.1", ", spatial")["change_pp"], 2, True),
}
