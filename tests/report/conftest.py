"""Make up records of the schema that the runner writes."""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spectrim.records import records

Record = dict[str, Any]
MODELS = {"resnet20": 0.30, "resnext20": 0.33, "densenet22": 0.40, "vgg19_half": 0.35}
TARGETS = {
    "truncation": "Truncation",
    "lossless": "Lossless",
    "compact": "Compact",
    "probe": "Probe",
    "bound_probe": "BoundProbe",
    "rank_selection": "RankSelection",
    "svd_training": "SVDTraining",
    "fine_tuning": "FineTuning",
    "joint": "Joint",
    "alds": "ALDS",
    "global_threshold": "GlobalThreshold",
    "knapsack": "Knapsack",
    "refitted": "Refitted",
    "sensitivity": "Sensitivity",
}
# Those that are given a budget, and how much more of the loss than joint they lose to it in what is made up.
BUDGETED = {"joint": 1.0, "knapsack": 2.0, "sensitivity": 3.0, "alds": 5.0, "global_threshold": 6.0}


def measured(params: int, macs: int, loss: float, accuracy: float | None) -> dict[str, Any]:
    """Return the cost and the losses of one network. Its calibration loss is a little lower than its test loss."""
    return {
        "params": params,
        "macs": macs,
        "calibration": {"loss": loss * 0.98, "accuracy": accuracy, "n": 2000},
        "test": {"loss": loss, "accuracy": accuracy, "n": 10000},
    }


def make(
    model: str = "resnet20",
    algorithm: str = "lossless",
    *,
    seed: int = 0,
    calibration_seed: int = 0,
    kept: float = 0.5,
    change: float = 0.01,
    experiment: str = "table2",
    settings: dict[str, Any] | None = None,
    calibration_from: str = "held_out",
    log: list[dict[str, Any]] | None = None,
    error: float = 0.1,
    checkpoint: str = "",
    decomposer: str = "svd_channel",
) -> Record:
    """Return one record. ``kept`` and ``change``: share of parameters and MACs kept, change of the test loss."""
    base = {"truncation": {"rank": None, "ratio": kept, "energy": None, "params_kept": None}, "probe": {}}
    base |= {name: {"params_kept": kept, "macs_kept": None} for name in BUDGETED}
    base |= {name: {"verified": False, "gamma": None, "norm": "entrywise"} for name in ("lossless", "compact")}
    chosen = base.get(algorithm, {}) | (settings or {})
    checkpoint = checkpoint or f"checkpoint of {model} {seed}"
    config = {
        "model": {"_class_": "Net", "option": model},
        "data": {"calibration_seed": calibration_seed, "calibration_from": calibration_from, "calibration_size": 2000},
        "shape": {"num_classes": 10},
        "decomposer": {"_class_": "WhitenedSVD" if decomposer.startswith("whitened") else "SVD", "option": decomposer},
        "algorithm": {"_class_": TARGETS[algorithm], **chosen},
        "seed": seed,
        "checkpoint": checkpoint,
    }
    loss = MODELS.get(model, 0.5) + 0.004 * seed
    before = measured(100_000, 1_000_000, loss, 0.91)
    after = measured(int(100_000 * kept), int(1_000_000 * kept), loss + change, 0.91 - change / 5)
    rank = max(1, int(20 * kept))
    sizes = {"full_rank": 64, "break_even": 20, "params_before": 1000, "params_after": int(1000 * kept)}
    layer = {
        "layer": "conv1",
        "shape": [64, 64, 3, 3],
        "rank": rank,
        "predicted_change": -0.001,
        "relative_error": error,
    }
    return {
        "schema": records.SCHEMA,
        "signature": records.signature(config),
        "experiment": experiment,
        "names": {"model": model, "data": "cifar10", "algorithm": algorithm, "decomposer": decomposer},
        "config": config,
        "seed": seed,
        "calibration_seed": calibration_seed,
        "dense": before,
        "compressed": after,
        "predicted_change": -0.001,
        "plan": {"conv1": {"rank": rank, "form": "channel"}},
        "layers": [layer | sizes],
        "log": log or [],
        "notes": [],
        "phases": {"load": {"seconds": 1.0, "peak_mib": 10.0}, "select": {"seconds": 2.5, "peak_mib": 10.0}},
        "provenance": {
            "command": "spectrim",
            "commit": "0" * 40,
            "dirty": False,
            "time_utc": "2025-01-01T00:00:00+00:00",
            "data_digest": "data",
            "checkpoint_digest": checkpoint,
            "lock_digest": "lock",
            "versions": {"python": "3.11"},
            "machine": {"cores": 2},
        },
    }


def table2(models: list[str] | None = None) -> list[Record]:
    """Return a grid like Table 2: two training seeds of ResNet-20, three calibration seeds of every algorithm."""
    found = []
    for model in models or list(MODELS):
        for seed in (0, 1) if model == "resnet20" else (0,):
            for ratio, change in ((0.25, 2.5), (0.5, 0.9), (0.75, 0.12)):
                found.append(make(model, "truncation", seed=seed, kept=ratio, change=change))
            for draw in (0, 1, 2):
                for algorithm, kept in (("lossless", 0.8), ("compact", 0.4)):
                    for verified, change in ((False, 0.6), (True, -0.004)):
                        one = make(
                            model,
                            algorithm,
                            seed=seed,
                            calibration_seed=draw,
                            kept=kept + 0.1 * verified,
                            change=change * (1 + 0.1 * draw) * (1.5 - kept),
                            settings={"verified": verified},
                        )
                        found.append(one)
    return found


def figure(experiment: str, ratios: tuple[float, ...], models: list[str]) -> list[Record]:
    """Return a sweep of truncations. Error and loss fall with the rank, but the loss rises where nearly all is kept."""
    return [
        make(
            model,
            "truncation",
            experiment=experiment,
            kept=ratio,
            change=2.3 * math.exp(-5 * ratio) + (0.06 if ratio > 0.9 else 0.0),
            error=1 - ratio,
        )
        for model in models
        for ratio in ratios
    ]


def table4() -> list[Record]:
    """Return compact and truncation of two trainings with three decompositions. The last of these loses least."""
    found = []
    for place, decomposer in enumerate(("svd_channel", "tucker2", "svd_spatial")):
        for seed in (0, 1):
            given: dict[str, Any] = {"seed": seed, "calibration_seed": seed, "decomposer": decomposer}
            change = 0.01 - 0.006 * place
            verified = {"verified": True}
            found.append(make("resnet20", "compact", experiment="table4", change=change, settings=verified, **given))
            found.append(make("resnet20", "truncation", experiment="table4", change=10 * change, **given))
    return found


def table7() -> list[Record]:
    """Return probes whose first order is right for small changes only, and runs with leakage."""
    log = []
    for index in range(60):
        size = 0.002 * 1.12**index
        predicted = (-1) ** index * 0.01 * size
        log.append(
            {
                "layer": f"conv{index % 7}",
                "rank": 60 - index,
                "relative_error": min(size * 2, 0.99),
                "max_abs_error": size,
                "predicted": predicted,
                "measured": predicted + 0.2 * size**2,
                "split": "calibration",
            }
        )
    found = [
        make(model, "probe", experiment="table7", kept=1.0, change=0.0, log=log) for model in ("resnet20", "densenet22")
    ]
    for source, change in (("held_out", 0.02), ("train", 0.05), ("test", -0.01)):
        for verified in (False, True):
            found.append(
                make(
                    "resnet20",
                    "lossless",
                    experiment="table7",
                    kept=0.9,
                    change=change * (1 if verified else 3),
                    calibration_from=source,
                    settings={"verified": verified},
                )
            )
    return found


def table8() -> list[Record]:
    """Return probes whose outputs reach 1 / depth of their bound, and selections by theory, which cut nothing."""
    found = []
    for depth in (2, 10):
        for seed in (0, 1):
            bound = 8.0 * depth + seed
            entry = {"measured": bound / depth, "bound": bound, "loss_change": -0.5, "loss_bound": 1.4 * bound}
            for checkpoint in ("trained", None):
                log = [{"ratio": ratio, "split": "calibration"} | entry for ratio in (0.25, 0.75)]
                found.append(_of_depth(depth, seed, "bound_probe", {}, log, checkpoint=checkpoint))
            for delta, kept, at in (("bisect", 0.5, 0.4), ("theory", 1.0, 1e-4)):
                step = {"loss": 0.4, "params_kept": kept, "rank_kept": kept}
                log = [{"delta": at, "passed": True} | step, {"delta": 2 * at, "passed": False} | step]
                settings = {"delta": delta, "epsilon": 0.1}
                change = 0.0 if kept == 1 else 0.05
                found.append(_of_depth(depth, seed, "rank_selection", settings, log, kept=kept, change=change))
    return found


def _of_depth(
    depth: int,
    seed: int,
    algorithm: str,
    settings: dict,
    log: list,
    *,
    checkpoint: str | None = "trained",
    **given: Any,
) -> Record:
    name = f"mlp{depth}" if checkpoint else f"mlp{depth}_untrained"
    one = make(name, algorithm, seed=seed, experiment="table8", settings=settings, log=log, **given)
    one["config"]["model"] |= {"depth": depth}
    one["config"]["checkpoint"] = one["provenance"]["checkpoint_digest"] = checkpoint and f"{name} {seed}"
    return one | {"signature": records.signature(one["config"])}


def table5() -> list[Record]:
    """Return LeNet-5 on MNIST: truncation with and without fine-tuning, and SVD training from either start."""
    recipe = {"epochs": 3}
    found = []
    for seed in (0, 1):
        budget = {"rank": None, "ratio": None, "energy": None, "params_kept": 0.06}
        found.append(_of_lenet5(seed, "truncation", budget, 0.06, 0.5))
        selector = budget | {"_class_": "Truncation"}
        found.append(_of_lenet5(seed, "fine_tuning", {"selector": selector, "recipe": recipe}, 0.06, 0.05))
        for scratch in (True, False):
            log = [_epoch(epoch, {"conv1": 9 - epoch, "fc1": 30 - epoch + seed}) for epoch in range(3)]
            settings = {"regulariser": "hoyer", "strength": 0.01, "epsilon": 0.02, "bounded": True, "recipe": recipe}
            found.append(_of_lenet5(seed, "svd_training", settings, 0.05, 0.01, scratch=scratch, log=log))
    return found


def _epoch(epoch: int, ranks: dict[str, int]) -> dict[str, Any]:
    """Return one epoch in the log of a training. The third epoch selects nothing."""
    tried = [(0.0, 0.3, True), (0.5, 1.5, False), (0.25, 0.31, True), (0.375, 0.9, False)]
    steps = [{"delta": delta, "loss": loss, "passed": passed, "rank_kept": 1 - delta} for delta, loss, passed in tried]
    losses = {"loss": 0.4 - 0.1 * epoch, "orthogonality": 0.01, "hoyer": 0.2}
    return {"epoch": epoch, **losses, "ranks": ranks, "bisection": steps if epoch < 2 else []}


def figure4(models: tuple[str, ...] = ("resnet20", "vgg19_half")) -> list[Record]:
    """Return every algorithm at four sizes for three trainings of each network. The loss rises as less is kept."""
    found = []
    for model in models:
        for seed in (0, 1, 2):
            for size in (0.826, 0.7, 0.5, 0.3):
                change = 0.25 * (1 - size) ** 3 * (1 + 0.2 * seed)
                cut = {"rank": None, "ratio": None}
                settings = {
                    "truncation": cut | {"energy": None, "params_kept": size},
                    "energy": cut | {"energy": size + 0.1, "params_kept": None},
                    "refitted": {"selector": {"_class_": TARGETS["knapsack"], "params_kept": size}, "samples": 1000},
                }
                for name, worse in {**BUDGETED, "truncation": 15.0, "energy": 10.0, "refitted": 1.5}.items():
                    one = make(
                        model,
                        "truncation" if name == "energy" else name,
                        seed=seed,
                        calibration_seed=seed,
                        kept=size,
                        change=worse * change,
                        experiment="figure4",
                        settings=settings.get(name),
                        decomposer="svd_channel" if name == "alds" else "whitened_spatial",
                    )
                    one["compressed"]["macs"] = int(1_000_000 * (0.1 + 0.9 * size))
                    if name in ("joint", "refitted"):
                        found.append(_stored_as("pivoted", one))
                    for keeps in (True, False) if name == "alds" else (False,):
                        fitted = name in ("joint", "refitted")
                        config = one["config"] | ({} if keeps or fitted else {"batch_norm": "follow"})
                        found.append(one | {"config": config, "signature": records.signature(config)})
    return found


def table9() -> list[Record]:
    """Return joint selection with its default settings, and with others that each raise the loss."""
    variants = [
        ({}, "pivoted", "pivoted", 0.0),
        ({"refit": 0}, "pivoted", "pivoted", 0.02),
        ({"significance": 0}, "pivoted", "pivoted", 0.01),
        ({"refit": 0, "significance": 0}, "pivoted", "pivoted", 0.03),
        ({}, "whitened_channel", "pivoted", 0.005),
        ({}, "whitened_best_view", "plain", 0.007),
    ]
    whole = {"refit": 500, "significance": None, "interaction": 0, "step": 1.0, "samples": 250, "ranks": "knapsack"}
    selector = {"_class_": "Joint", "params_kept": 0.5, "macs_kept": None, **whole}
    twice = [
        make(
            algorithm="refitted",
            seed=seed,
            calibration_seed=seed,
            change=0.008 + 0.001 * seed,
            experiment="table9",
            settings={"selector": selector, "samples": 500},
            decomposer="pivoted",
        )
        for seed in (0, 1)
    ]
    return [_stored_as("pivoted", one) for one in twice] + [
        _stored_as(
            factors,
            make(
                algorithm="joint",
                seed=seed,
                calibration_seed=seed,
                change=0.01 + worse + 0.001 * seed,
                experiment="table9",
                settings={**whole, **less},
                decomposer=decomposer,
            ),
        )
        for seed in (0, 1)
        for less, decomposer, factors, worse in variants
    ]


def _stored_as(factors: str, one: Record) -> Record:
    """Return a record whose decomposer stores these factors."""
    config = one["config"] | {"decomposer": one["config"]["decomposer"] | {"factors": factors}}
    return one | {"config": config, "signature": records.signature(config)}


def table11() -> list[Record]:
    """Return joint selection and a refitted knapsack, each with and without a refinement that halves the loss."""
    found, steps = [], {"steps": 4, "inputs": 200, "samples": 400, "seconds": 3.0}
    for seed in (0, 1):
        for name, settings in (
            ("joint", {"params_kept": 0.1}),
            ("refitted", {"selector": {"_class_": "Knapsack", "params_kept": 0.1}}),
        ):
            for refine in (None, {"_class_": "Refinement", "samples": 400}):
                worse = (0.04 if name == "joint" else 0.08) * (1 if refine is None else 0.5) + 0.001 * seed
                own = {**settings, **({} if refine is None else {"refine": refine})}
                one = make(
                    "lenet5",
                    algorithm=name,
                    seed=seed,
                    calibration_seed=seed,
                    change=worse,
                    experiment="table11",
                    settings=own,
                    decomposer="pivoted",
                )
                one["log"] = [] if refine is None else [{**steps, "distance_before": 0.2, "distance_after": 0.1}]
                found.append(one)
    return found


def table12() -> list[Record]:
    """Return algorithms on the images that they are judged on. Every image gains as much, and one gains 0.2 more."""
    found = []
    cases = [
        ("lossless", "one-shot", 0.9, -0.05),
        ("lossless", "one-shot", 0.4, 2.0),
        ("compact", "verified", 0.8, -0.01),
    ]
    for name, mode, kept, change in [*cases, ("truncation", "", 0.44, 3.0), ("joint", "", 0.44, 0.5)]:
        settings = {"verified": mode == "verified", "gamma": kept} if mode else {}
        one = make("resnet50", name, kept=kept, change=change, experiment="table12", settings=settings)
        one["names"]["data"] = "imagenet20"
        dense = [0.1 * image for image in range(20)]
        after = [loss + change - 0.01 + 0.2 * (image == 7) for image, loss in enumerate(dense)]
        one["test_losses"] = {"dense": dense, "compressed": after}
        one["agreement"] = {"cifar10": {"divergence": 1 - kept, "same_answer": kept, "n": 200}}
        found.append(one)
    return found


def table6() -> list[Record]:
    """Return algorithms on a trained network, and on untrained ones of two depths, widths and calibration sizes."""
    found = []
    for seed in (0, 1):
        for name in (*BUDGETED, "compact"):
            found.append(_selected(name, seed, "resnet20", {"depth": 20, "width": 16}, 2000, trained=True))
        for name in ("joint", "sensitivity"):
            for depth, width, images in ((20, 16, 500), (56, 16, 500), (20, 32, 500), (20, 16, 4000)):
                model = f"resnet{depth}_width{width}_untrained"
                found.append(_selected(name, seed, model, {"depth": depth, "width": width}, images, trained=False))
    return found


def _selected(name: str, seed: int, model: str, shape: dict, images: int, trained: bool) -> Record:
    """Return a selection that takes a second for each layer, pass and thousand images."""
    one = make(model, name, seed=seed, calibration_seed=seed, experiment="table6")
    one["config"]["model"] |= shape
    one["config"]["data"] |= {"calibration_size": images}
    if not trained:
        one["config"]["checkpoint"] = one["provenance"]["checkpoint_digest"] = None
    layers = shape["depth"] - 1
    passes = {"sensitivity": 9 * layers + 2, "joint": 10}.get(name, 1)
    one["layers"] = layers * one["layers"]
    one["samples_read"] = {"calibration": (passes + 1) * images}
    one["reporting"] = {"seconds": 3.0, "cpu_seconds": 2.5, "samples_read": {"calibration": images}}
    seconds = passes * layers * images / 1000 * (shape["width"] / 16) ** 2 + 0.01 * seed
    memory = {"peak_mib": 400.0 + images / 10, "added_mib": images / 10}
    one["phases"]["select"] = {"seconds": 3 + 2 * seconds, "cpu_seconds": 2.5 + seconds, **memory}
    return one | {"signature": records.signature(one["config"])}


def _of_lenet5(
    seed: int, algorithm: str, settings: dict, kept: float, change: float, *, scratch: bool = False, log: Any = None
) -> Record:
    name = "lenet5_untrained" if scratch else "lenet5"
    one = make(name, algorithm, seed=seed, experiment="table5", kept=kept, change=change, settings=settings, log=log)
    one["names"]["data"] = "mnist"
    if log:
        one["layers"] = [one["layers"][0] | {"layer": layer} for layer in log[0]["ranks"]]
    if scratch:
        one["config"]["checkpoint"] = one["provenance"]["checkpoint_digest"] = None
        one["dense"]["test"] |= {"accuracy": 0.1, "loss": 2.3}
    return one | {"signature": records.signature(one["config"])}


def table1(**given: Any) -> list[Record]:
    """Return the records of ``table1_records``."""
    return _beside("table1_records").table1(make, **given)


def table3() -> list[Record]:
    """Return the records of ``table3_records``."""
    return _beside("table3_records").table3(make)


def doses() -> list[Record]:
    """Return the records of Figure 9, of ``table3_records``."""
    return _beside("table3_records").doses(make)


def _beside(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    beside = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(beside)
    return beside


def everything() -> list[Record]:
    """Return records of all experiments."""
    sweep = tuple(round(0.1 * step, 1) for step in range(1, 10))
    return [
        *table1(nets=("resnet20",)),
        *table2(),
        *table3(),
        *table4(),
        *table7(),
        *table8(),
        *table5(),
        *table6(),
        *table9(),
        *table11(),
        *table12(),
        *figure4(("resnet20",)),
        *figure("figure2", (0.4, 0.6, 0.8, 0.95), list(MODELS)),
        *figure("figure3", sweep, ["densenet22", "vgg19_half"]),
    ]


@pytest.fixture
def record() -> Callable[..., Record]:
    """Return the factory of one record."""
    return make


@pytest.fixture
def grid() -> Callable[..., list[Record]]:
    """Return the factory of a grid like that of Table 2."""
    return table2


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Write the records of all experiments into a folder."""
    for one in everything():
        records.write(tmp_path / "records", one)
    return tmp_path / "records"
