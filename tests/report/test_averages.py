"""Means over seeds, with their deviation and their n."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from spectrim.report import averages, frame

Make = Callable[..., Any]


def test_mean_and_deviation_over_seeds_are_those_of_numpy(record: Make) -> None:
    changes = [0.1, 0.4, 0.2]
    runs = frame.runs([record(calibration_seed=index, change=change) for index, change in enumerate(changes)])
    (row,) = averages.over_seeds(runs, ["model", "method"], ["change_test_loss"]).to_dict(orient="records")
    assert row["change_test_loss"] == pytest.approx(np.mean(changes))
    assert row["change_test_loss_std"] == pytest.approx(np.std(changes, ddof=1))
    assert (row["runs"], row["n"]) == (3, "1 × 3")


def test_a_single_run_has_no_deviation(record: Make) -> None:
    row = averages.over_seeds(frame.runs([record()]), ["model", "method"], ["test_loss"]).iloc[0]
    assert math.isnan(row["test_loss_std"]) and row["n"] == "1 × 1"


def test_n_says_where_a_run_is_missing(record: Make) -> None:
    runs = frame.runs([record(seed=seed, calibration_seed=draw) for seed, draw in ((0, 0), (0, 1), (1, 0))])
    assert averages.spelled_n(runs) == "2 × 2 (3 runs)"


def test_n_says_where_each_training_seed_has_a_draw_of_its_own(record: Make) -> None:
    runs = frame.runs([record(seed=seed, calibration_seed=seed) for seed in (0, 1, 2)])
    assert averages.spelled_n(runs) == "3 pairs"
    assert averages.spelled_n(runs[:1]) == "1 × 1"


def test_the_dense_row_counts_training_seeds_not_calibration_draws(grid: Make) -> None:
    rows = averages.with_dense(frame.runs(grid(["resnet20"])), ["test_loss", "change_test_loss", "params_kept"])
    dense = rows.iloc[0]
    assert (dense["method"], dense["n"], dense["runs"], dense["params_kept"]) == ("dense", "2", 2, 1.0)
    assert dense["test_loss"] == pytest.approx(0.302)
    assert dense["test_loss_std"] == pytest.approx(np.std([0.300, 0.304], ddof=1))
    assert math.isnan(dense["change_test_loss"]) and math.isnan(dense["params_kept_std"])
    assert set(rows.loc[rows["variant"].str.startswith("lossless"), "n"]) == {"2 × 3"}


def test_a_model_on_two_data_sets_is_told_apart(record: Make) -> None:
    other = record(change=0.5)
    other["names"] = other["names"] | {"data": "mnist"}
    other["config"] = other["config"] | {"data": other["config"]["data"] | {"_class_": "MNIST"}}
    rows = averages.with_dense(frame.runs([record(change=0.1), other]), ["change_test_loss"])
    compressed = rows[rows["method"] != "dense"].set_index("model")["change_test_loss"]
    assert compressed.to_dict() == pytest.approx({"resnet20 on cifar10": 0.1, "resnet20 on mnist": 0.5})
    assert list(rows["n"]) == ["1", "1 × 1"] * 2


def test_the_note_on_seeds_names_the_models_where_they_differ(grid: Make) -> None:
    lossless = [run for run in grid(["vgg11"]) if run["names"]["algorithm"] == "lossless"]
    one = averages.with_dense(frame.runs(lossless), ["test_loss"])
    assert averages.seeds_note(one) == "Mean ± standard deviation over training seeds × calibration seeds (1 × 3)."
    two = averages.with_dense(frame.runs(grid(["resnet20", "vgg11"])), ["test_loss"])
    assert averages.seeds_note(two).endswith("(resnet20: 2 × 1, 2 × 3; vgg11: 1 × 1, 1 × 3).")
