"""Records to rows: changes are compressed minus dense, and seeds are averaged with their n."""

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from spectrim.errors import UserError
from spectrim.report import frame

Make = Callable[..., Any]


def test_reports_need_no_torch() -> None:
    modules = "frame, table, figure, compare, claims, command"
    code = f"import sys; from spectrim.report import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_is_a_row_of_shares_and_changes(record: Make) -> None:
    one = record(kept=0.25, change=0.1, error=0.3)
    (row,) = frame.runs([one]).to_dict(orient="records")
    assert row["params_kept"] == row["macs_kept"] == row["layers_kept"] == 0.25
    assert row["change_test_loss"] == pytest.approx(0.1)
    assert row["change_test_accuracy_pp"] == pytest.approx(-2.0)
    assert row["seconds"] == 3.5
    assert row["relative_error"] == pytest.approx(0.3)


def test_relative_error_is_a_root_mean_square_in_which_a_dense_layer_counts_nothing(record: Make) -> None:
    one = record(error=0.4)
    dense = one["layers"][0] | {"rank": None, "relative_error": None}
    one["layers"] += [dense] * 3
    assert frame.runs([one])["relative_error"][0] == pytest.approx(0.2)


def test_a_task_without_accuracy_has_none_in_its_row(record: Make) -> None:
    one = record()
    for net in (one["dense"], one["compressed"]):
        net["test"]["accuracy"] = net["calibration"]["accuracy"] = None
    row = frame.runs([one]).iloc[0]
    assert math.isnan(row["test_accuracy"]) and math.isnan(row["change_test_accuracy_pp"])
    assert row["change_test_loss"] == pytest.approx(0.01)


def test_a_classifier_of_torchvision_goes_by_its_own_name(record: Make) -> None:
    one, other = record("torchvision"), record("resnet20")
    one["config"]["model"]["name"] = "vgg16_bn"
    other["names"]["data"] = "mnist"
    assert frame.model_of(one) == "vgg16_bn" and frame.model_of(other) == "resnet20"
    assert frame.data_of(frame.runs([one, other, record("resnet20")])) == "mnist, cifar10"


def test_seeds_do_not_tell_settings_apart_and_all_else_does(record: Make) -> None:
    same = frame.runs([record(), record(seed=1), record(calibration_seed=1)])
    assert same["group"].nunique() == 1 and same["signature"].nunique() == 3
    other = frame.runs([record(), record(settings={"gamma": 0.008}), record(calibration_from="test")])
    assert other["group"].nunique() == 3


def test_a_record_without_batch_norm_kept_it(record: Make) -> None:
    followed = record()
    followed["config"]["batch_norm"] = "follow"
    followed["signature"] = "followed"
    assert set(frame.runs([record(), followed])["method"]) == {
        "lossless, one-shot, batch norm keep",
        "lossless, one-shot, batch norm follow",
    }


def test_settings_of_one_variant_are_told_apart_by_what_differs(record: Make) -> None:
    found = frame.runs([record(settings={"gamma": 0.008}), record(settings={"gamma": 0.1}), record(model="vgg11")])
    assert set(found["variant"]) == {"lossless, one-shot"}
    assert set(found["method"]) == {
        "lossless, one-shot, gamma 0.008",
        "lossless, one-shot, gamma 0.1",
        "lossless, one-shot",
    }


def test_a_setting_that_older_records_omit_has_the_value_they_were_made_with(record: Make) -> None:
    older, newer = record("resnet20", "joint"), record("resnet20", "joint", settings={"ranks": "knapsack"})
    assert sorted(frame.runs([older, newer])["method"]) == ["joint, ranks greedy", "joint, ranks knapsack"]
    pivoted = record("resnet20", "joint", decomposer="whitened")
    pivoted["config"]["decomposer"]["factors"] = "pivoted"
    plain = record("resnet20", "joint", decomposer="whitened")
    assert sorted(frame.runs([plain, pivoted])["method"]) == ["joint, factors pivoted", "joint, factors plain"]


def test_two_decomposers_go_by_their_classes(record: Make) -> None:
    other = record()
    other["config"] = other["config"] | {"decomposer": {"_class_": "WhitenedSVD"}}
    usual = record()
    usual["config"] = usual["config"] | {"decomposer": {"_class_": "SVD"}}
    assert set(frame.runs([usual, other])["method"]) == {"lossless, one-shot, SVD", "lossless, one-shot, WhitenedSVD"}


def test_rows_are_ordered_by_family_then_size_then_method(record: Make) -> None:
    pairs = [("vgg19_half", "compact"), ("resnet110", "lossless"), ("resnet20", "compact"), ("resnet20", "lossless")]
    cuts = [record("resnet20", "truncation", kept=kept) for kept in (0.25, 0.75)]
    found = frame.runs([*(record(model, algorithm) for model, algorithm in pairs), *cuts])
    assert list(found["model"]) == ["resnet20"] * 4 + ["resnet110", "vgg19_half"]
    assert [name.partition(",")[0] for name in found["variant"]][:4] == ["truncation"] * 2 + ["lossless", "compact"]
    assert list(found["ratio"][:2]) == [0.75, 0.25]


def test_records_of_two_checkpoints_are_not_averaged(record: Make) -> None:
    with pytest.raises(UserError, match="different checkpoints"):
        frame.runs([record(), record(calibration_seed=1, checkpoint="an older training")])


def test_a_torchvision_model_goes_by_its_own_name(record: Make) -> None:
    one = record("torchvision")
    one["config"]["model"]["name"] = "resnet50"
    assert frame.runs([one])["model"][0] == "resnet50"


def test_families_without_a_model_are_named() -> None:
    assert frame.missing(["resnet20", "ResNeXt101", "DenseNet169", "VGG-19"]) == []
    assert frame.missing(["resnet20"]) == ["There are no records of: resnext, densenet, vgg."]


def test_no_records_make_an_empty_frame() -> None:
    assert frame.runs([]).empty
