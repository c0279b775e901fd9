"""Measure two variants of joint selection for which the library has no setting, on images that no selection reads.

One chooses the view of each layer inside the knapsack. The other takes the gates at a refitted model half of the way.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from measure import Outcome, Target, composed, noise_images, untrained
from torch import Tensor, nn
from tqdm import tqdm

from spectrim.algorithms.joint import Joint
from spectrim.algorithms.shared import knapsack
from spectrim.algorithms.shared.budget import Costs, costs_of
from spectrim.algorithms.shared.compressed import Compressed
from spectrim.algorithms.shared.expansion import gates_at
from spectrim.algorithms.shared.workbench import Workbench
from spectrim.checkpoints import single_file
from spectrim.data.images import ImageSplit
from spectrim.decomposers.spectrum import Spectrum
from spectrim.decomposers.whitened import WhitenedSVD
from spectrim.factored.linalg import tail_sums
from spectrim.factored.plan import Kept, RankPlan
from spectrim.models.resnet import ResNet
from spectrim.refit import factors
from spectrim.refit.weighting import output_weights
from spectrim.report.paired import p_value
from spectrim.report.table import Column, Table, number
from spectrim.runs import configuration, targets
from spectrim.statistics import paired_loss
from spectrim.statistics.objective import Objective
from spectrim.statistics.paired_loss import Losses
from spectrim.statistics.remembered import MEASUREMENTS
from spectrim.surgery.cost import parameters
from spectrim.tools import resume
from spectrim.tools.content import of_model
from spectrim.tools.memo import Memory

ROOT = Path(__file__).resolve().parents[1]
RESUME, CHECKPOINTS = ROOT / "build/benchmarks/variants", ROOT / "results/checkpoints"
SIZES, SEEDS = (0.5, 0.3), (0, 1, 2)
CALIBRATION, VERIFICATION = 1000, 4000  # all of the 5,000 images that no training sees
DEFAULT = "joint selection, default"
IN_KNAPSACK = "view chosen inside the knapsack"
REFITTED = "gates at the refitted model half of the way"
VIEWS = [WhitenedSVD("channel", factors="pivoted"), WhitenedSVD("spatial", factors="pivoted")]
CERTAIN = 2.0  # standard errors
COLUMNS = (
    Column("size", "asked %", 0, scale=100),
    Column("variant", "variant"),
    Column("params_kept", "params kept %", 1, scale=100),
    Column("macs_kept", "MACs kept %", 1, scale=100),
    Column("spatial", "layers in the spatial view", 1),
    Column("predicted", "predicted Δ loss", 4, signed=True),
    Column("accuracy", "top-1 %", 2, scale=100),
    Column("change_accuracy_pp", "Δ top-1 to dense pp", 2, signed=True),
    Column("change", "Δ loss to dense", 4, signed=True),
    Column("to_default", "Δ loss to the default", 4, signed=True),
    Column("to_default_p", "its p", 3),
)
NOTES = (
    "Each training has a calibration draw of its own. No training and no selection reads the verification split. Mean "
    "± standard deviation (ddof = 1). Δ to the default: to the default of the same training, on the same images. Its p "
    "is that of a two-sided paired t-test over the trainings. A variant pays if it lowers the loss by more than two "
    "standard errors at every size.",
    "The default takes the view of each layer by its mean error over all sizes. Inside the knapsack, the ranks of both "
    "views are options of one layer. Predicted: the sum that the knapsack minimises.",
    "Half of the way: joint selection to the size midway between dense and the one asked for, with its refit. There "
    "the layers are decomposed anew and the gates taken anew. At the end the factors are fitted to the dense network. "
    "It costs two selections.",
    "Within a budget of parameters the form is no choice. Plain and pivoted factors of the same components compute the "
    "same. The second target compares their parameters in each layer and view, at every rank at which plain factors "
    "are smaller than the weight.",
)


class Subject(NamedTuple):
    """A network, its calibration draw, the images that it is judged on, and the settings of joint selection."""

    model: nn.Module
    objective: Objective
    verification: ImageSplit
    settings: Mapping[str, Any]


class Option(NamedTuple):
    """What a layer may become: some components of a spectrum, their parameters, and the predicted change."""

    spectrum: Spectrum
    components: tuple[int, ...]
    cost: float
    change: float


class Expansion(NamedTuple):
    """The options of each layer in one decomposition, from the expansion of the loss at the dense model."""

    bench: Workbench
    costs: Costs
    options: dict[str, list[Option]]


class Judged(NamedTuple):
    """The loss of each image of the verification split, and the accuracy."""

    losses: Losses
    accuracy: float


def benchmark(quick: bool) -> Outcome:
    """Compress each network to each size in each way, and measure all of them on the verification split."""
    with resume.into(None if quick else RESUME):  # what a killed run has measured is kept
        return _measured(quick)


def _measured(quick: bool) -> Outcome:
    subjects, sizes = (list(_noise()), SIZES[:1]) if quick else (list(_trained()), SIZES)
    rows, dense, digests, unlike = list[dict[str, Any]](), list[Judged](), list[str](), 0
    dearer: dict[tuple[str, Kept], bool] = {}  # the same for all trainings
    with tqdm(desc="variants", total=len(subjects) * len(sizes), leave=False, disable=None) as bar:
        for subject in subjects:
            digests.append(subject.verification.digest())
            dense.append(_judged(subject, subject.model))
            *views, better = (_expanded(subject, own) for own in (*VIEWS, Joint.decomposer))
            dearer |= {key: own for view in views for key, own in _plain_is_dearer(view).items()}
            for size in sizes:
                made = dict(_compressed(subject, size, *views))
                unlike += _unlike(made[DEFAULT].plan, _chosen(better.costs, better.options, size))
                rows += _rows(subject, size, made, dense[-1])
                bar.update()
    data, larger = _averaged(pd.DataFrame(rows)), list(dearer.values())
    met = [
        Target("layers set unlike joint selection in the default's views", unlike, 0, False, "layers", 0),
        Target("plain factors no larger than pivoted ones", larger.count(False), 0, False, f"of {len(larger)}", 0),
    ]
    notes = [*(target.line() for target in met), *_verdicts(data), _dense_networks(dense), *NOTES]
    settings = {"quick": quick, "sizes": list(sizes), "calibration": CALIBRATION, "verification": VERIFICATION}
    name = "ResNet-8 on noise" if quick else "ResNet-20 on CIFAR-10"
    caption = f"Two variants of joint selection of {name}, on the verification split"
    return Outcome(Table("variants", data, COLUMNS, caption, notes, group="size"), met, settings, ", ".join(digests))


def _noise() -> Iterator[Subject]:
    for seed in range(2):
        torch.manual_seed(seed)
        splits = {"calibration": noise_images(16, 8), "verification": noise_images(24, 8)}
        objective = Objective(F.cross_entropy, splits)
        yield Subject(ResNet(8).eval(), objective, splits["verification"], {"samples": 8, "refit": 8})


def _trained() -> Iterator[Subject]:
    sizes = [f"data.calibration_size={CALIBRATION}", f"data.verification_size={VERIFICATION}"]
    for seed in SEEDS:
        cfg = composed("model=resnet20", "data=cifar10", f"data.calibration_seed={seed}", *sizes)
        splits = targets.build(configuration.plain(cfg.data), "load").load()
        given = {name: getattr(splits, name) for name in ("calibration", "verification")}
        model = single_file.load(CHECKPOINTS / f"resnet20-cifar10-seed{seed}.safetensors", untrained("resnet20")).eval()
        memory = Memory(whitened=3, gates=3, **MEASUREMENTS)  # of three decompositions, for all sizes
        yield Subject(model, Objective(splits.loss, given, memory=memory), splits.verification, {})


def _expanded(subject: Subject, decomposer: Any) -> Expansion:
    """Expand the loss at the dense model, as joint selection does."""
    bench = Workbench.of(subject.model, decomposer, subject.objective)
    chosen, costs = Joint(params_kept=0.5, **subject.settings), costs_of(bench, "params")
    all_R = {name: torch.arange(spectrum.max_rank) for name, spectrum in bench.spectra.items()}
    gates = gates_at(bench, all_R, chosen.samples, chosen.seed, first_order=False)
    options = {}
    for name, row in gates.rows.items():
        alone_R = row.fisher.double().square().mean(0) / 2
        dearest = alone_R.argsort(descending=True, stable=True)
        changes = tail_sums(alone_R[dearest]).tolist()
        options[name] = [
            Option(bench.spectra[name], tuple(sorted(dearest[:k].tolist())), costs.layer(name, k), changes[k])
            for k in range(1, len(alone_R))
            if costs.pays(name, k)
        ]
    return Expansion(bench, costs, options)


def _compressed(subject: Subject, size: float, *views: Expansion) -> Iterator[tuple[str, Compressed]]:
    """Yield the compressed model of each variant."""
    model, objective, settings = subject.model, subject.objective, subject.settings
    yield DEFAULT, Joint(params_kept=size, **settings).compress(model, Joint.decomposer, objective)
    first = views[0]
    both = {name: [option for view in views for option in view.options[name]] for name in first.options}
    chosen = _chosen(first.costs, both, size)
    spectra = {**first.bench.spectra, **{name: own.spectrum for name, own in chosen.items()}}
    log = [{"predicted": sum(own.change for own in chosen.values())}]
    bench = replace(first.bench, spectra=MappingProxyType(spectra))
    yield IN_KNAPSACK, _refitted(subject, bench.finish({name: own.components for name, own in chosen.items()}, log))
    midway = Joint(params_kept=(1 + size) / 2, **settings).compress(model, Joint.decomposer, objective).model
    rest = Joint(params_kept=size * parameters(model) / parameters(midway), **{**settings, "refit": 0})
    yield REFITTED, _refitted(subject, replace(rest.compress(midway, Joint.decomposer, objective), dense=model, log=[]))


def _refitted(subject: Subject, compressed: Compressed) -> Compressed:
    """Fit the factors as joint selection does, in place."""
    model, objective, chosen = subject.model, subject.objective, Joint(params_kept=0.5, **subject.settings)
    layers = [name for name, own in model.named_modules() if isinstance(own, nn.Conv2d | nn.Linear)]
    weights = output_weights(chosen.refit_by, model, layers, objective, chosen.refit)
    factors.refit(compressed.model, model, objective, chosen.refit, weights=weights)
    return compressed


def _chosen(costs: Costs, options: Mapping[str, Sequence[Option]], size: float) -> dict[str, Option]:
    """Return the option of each layer that is not left dense, by the knapsack."""
    layers = {
        name: knapsack.Options(*np.array([*((own.cost, own.change) for own in given), (costs.dense[name], 0.0)]).T)
        for name, given in options.items()
    }
    best = knapsack.choose(layers, costs.of_layers(size, layers))
    return {name: given[best[name]] for name, given in options.items() if best[name] < len(given)}


def _unlike(plan: RankPlan, chosen: Mapping[str, Option]) -> int:
    """Return the number of layers in which the plan of joint selection is not what the knapsack here has chosen."""
    ours = {name: own.spectrum.kept(own.components) for name, own in chosen.items()}
    return sum(plan.get(name) != ours.get(name) for name in plan.keys() | ours.keys())


def _plain_is_dearer(view: Expansion) -> dict[tuple[str, Kept], bool]:
    """Return, for each plain option that is smaller than its layer, whether pivoted factors are smaller still."""
    found = {}
    for name, spectrum in view.bench.spectra.items():
        plain = spectrum.plain()
        for rank in range(1, spectrum.max_rank + 1):
            if plain.cost(rank) < view.costs.dense[name]:
                found[name, plain.kept(rank)] = spectrum.cost(rank) < plain.cost(rank)
    return found


def _judged(subject: Subject, model: nn.Module) -> Judged:
    """Measure a model on the verification split. The result is kept in ``RESUME`` too."""

    def measured() -> dict[str, Tensor]:
        accuracy = torch.tensor(subject.objective.evaluate(model, "verification").accuracy, dtype=torch.float64)
        return {**paired_loss.losses(subject.objective, model, "verification")._asdict(), "accuracy": accuracy}

    found = resume.tensors("judged", lambda: [subject.verification.digest(), of_model(model)], measured)
    return Judged(Losses(found["values"], found["weights"]), float(found["accuracy"]))


def _rows(subject: Subject, size: float, made: Mapping[str, Compressed], dense: Judged) -> Iterator[dict[str, Any]]:
    """Yield a row for each variant of one training at one size."""
    judged = {variant: _judged(subject, own.model) for variant, own in made.items()}
    for variant, own in made.items():
        here = judged[variant]
        yield {
            "size": size,
            "variant": variant,
            "params_kept": own.params_kept,
            "macs_kept": own.macs_kept,
            "spatial": sum(kept.form.to_text().endswith("spatial") for kept in own.plan.values()),
            "predicted": own.log[-1]["predicted"] if own.log else math.nan,
            "accuracy": here.accuracy,
            "change_accuracy_pp": 100 * (here.accuracy - dense.accuracy),
            "change": paired_loss.change(dense.losses, here.losses).mean,
            "to_default": paired_loss.change(judged[DEFAULT].losses, here.losses).mean,
        }


def _averaged(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the mean and the standard deviation over the trainings."""
    groups = runs.groupby(["size", "variant"], sort=False)
    data = groups.mean().join(groups.std(ddof=1), rsuffix="_std").reset_index()
    data["runs"] = groups.size().to_numpy()
    data.loc[data["variant"] == DEFAULT, ["to_default", "to_default_std"]] = math.nan
    data["to_default_p"] = list(map(p_value, data["to_default"], data["to_default_std"], data["runs"]))
    return data


def _verdicts(data: pd.DataFrame) -> Iterator[str]:
    """Yield one line for each variant: whether it pays."""
    for variant in (IN_KNAPSACK, REFITTED):
        own = data[data["variant"] == variant]
        mean, error = own["to_default"], own["to_default_std"] / own["runs"] ** 0.5
        said = " and ".join(
            f"{number(change, 4, signed=True)} ± {spread:.4f} at {100 * size:g} %"
            for size, change, spread in zip(own["size"], mean, error, strict=True)
        )
        verdict = "pays" if (mean + CERTAIN * error < 0).all() else "does not pay"
        yield f"{variant[0].upper() + variant[1:]}: {verdict}. Δ loss to the default ± standard error: {said}."


def _dense_networks(dense: Sequence[Judged]) -> str:
    accuracy, loss = np.mean([(own.accuracy, float(own.losses.values.mean())) for own in dense], 0)
    return f"{len(dense)} trainings. The dense networks: top-1 {100 * accuracy:.2f} %, loss {loss:.4f}."
