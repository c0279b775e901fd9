"""Records: a run has one name, and its file is there whole or not at all."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spectrim.errors import UserError
from spectrim.records import records


def record(**changes: Any) -> dict[str, Any]:
    config = {"model": {"_class_": "ResNet", "depth": 20}, "seed": 0}
    return {
        "schema": records.SCHEMA,
        "signature": records.signature(config),
        "experiment": "table2",
        "names": {"model": "resnet20"},
        "config": config,
        "seed": 0,
        "dense": {"test": {"loss": 0.1 + 0.2}},
        "compressed": {"test": {"loss": 1 / 3}},
        "provenance": {"commit": "unknown"},
    } | changes


def test_signature_does_not_depend_on_order_or_on_how_a_whole_number_is_written() -> None:
    assert records.signature({"a": 1, "b": [1, 2]}) == records.signature({"b": (1.0, 2), "a": 1.0})
    assert len(records.signature({})) == 16


@pytest.mark.parametrize("other", [{"a": 2}, {"a": "1"}, {"a": True}, {"a": None}, {"a": 1, "b": 0}, {}])
def test_signature_tells_configurations_apart(other: dict[str, Any]) -> None:
    assert records.signature(other) != records.signature({"a": 1})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_signature_refuses_what_json_cannot_say(value: object) -> None:
    with pytest.raises(UserError, match="cannot be signed"):
        records.signature({"a": value})


def test_a_written_record_is_read_back_equal(tmp_path: Path) -> None:
    path = records.write(tmp_path, record())
    assert path == tmp_path / "table2" / f"{record()['signature']}.json"
    assert records.read(path) == record()
    assert records.read_all(tmp_path, "table2") == [record()]


def test_digest_is_the_sha256_of_the_file_before_and_after_a_round_trip(tmp_path: Path) -> None:
    path = records.write(tmp_path, record())
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert records.digest(record()) == expected
    assert records.digest(records.read(path)) == expected


def test_read_all_is_sorted_and_ignores_temporary_files(tmp_path: Path) -> None:
    for name in ("b" * 16, "a" * 16):
        records.write(tmp_path, record(signature=name))
    half = tmp_path / "table2" / f".{'c' * 16}.json.machine.{'0' * 16}.tmp"
    half.mkdir()
    (half / "made").write_text('{"schema"')
    assert [one["signature"] for one in records.read_all(tmp_path, "table2")] == ["a" * 16, "b" * 16]
    assert records.read_all(tmp_path, "table3") == []


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_named_and_nothing_is_written(tmp_path: Path, number: float) -> None:
    with pytest.raises(UserError, match=r"log\[0\]\.loss is"):
        records.write(tmp_path, record(log=[{"loss": number}]))
    assert list(tmp_path.rglob("*")) == []


def test_a_file_where_the_folder_should_be_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "table2").write_text("not a folder")
    with pytest.raises(UserError, match="cannot write"):
        records.write(tmp_path, record())


@pytest.mark.parametrize("keep", [0, 1, 40])
def test_a_truncated_record_is_named(tmp_path: Path, keep: int) -> None:
    path = records.write(tmp_path, record())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=path.name):
        records.read_all(tmp_path, "table2")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "not a record"),
        ('{"schema": 1}', "not a record"),
        (json.dumps(record(schema=3)), "schema 3, .*: update spectrim"),
    ],
)
def test_what_is_not_a_record_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "one.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        records.read(path)


def test_a_missing_record_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        records.read(tmp_path / "none.json")


def test_a_record_without_a_field_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs provenance"):
        records.write(tmp_path, {key: value for key, value in record().items() if key != "provenance"})


@pytest.mark.parametrize("experiment", ["", "../elsewhere", "/etc", "a/../../b"])
def test_an_experiment_never_leaves_the_folder(tmp_path: Path, experiment: str) -> None:
    with pytest.raises(UserError, match="is not a name"):
        records.path_of(tmp_path, experiment, "0" * 16)


def test_a_nested_experiment_is_a_folder_of_its_own(tmp_path: Path) -> None:
    assert records.path_of(tmp_path, "imagenet/table2", "f1") == tmp_path / "imagenet" / "table2" / "f1.json"


def test_records_and_provenance_need_no_torch() -> None:
    code = "import sys, spectrim.records.records, spectrim.records.provenance; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_class_is_signed_by_its_name_wherever_its_module_lies() -> None:
    def settings(home: str) -> dict:
        inner = {"_target_": f"{home}.Truncation", "ratio": 0.5}
        return {"algorithm": {"_target_": f"{home}.Refitted", "selector": inner, "among": [inner]}, "seed": 0}

    here, there = (records.identity(settings(home)) for home in ("spectrim.algorithms.refitted", "spectrim.elsewhere"))
    assert here == there and records.class_of(here["algorithm"]["selector"]) == "truncation"
    assert records.class_of(here["algorithm"]["among"][0]) == "truncation" and "_target_" not in json.dumps(here)


def test_a_setting_that_came_late_is_signed_only_where_it_is_not_at_its_default() -> None:
    old = {"seed": 0, "algorithm": {"_target_": "spectrim.any.Joint", "also": {}}}
    assert records.identity(old | {"batch_norm": "keep", "also": {}}) == records.identity(old)
    assert records.identity(old | {"batch_norm": "follow"}) != records.identity(old)
    assert "also" in records.identity(old)["algorithm"]  # late for a run, not for every class


def test_a_setting_that_came_late_to_a_class_is_left_out_where_it_is_that_of_the_older_records() -> None:
    joint = {"_target_": "spectrim.algorithms.joint.Joint", "params_kept": 0.5}
    old = records.identity({"seed": 0, "algorithm": {"_target_": "x.Refitted", "selector": joint}})
    greedy, knapsack = (
        records.identity({"seed": 0, "algorithm": {"_target_": "x.Refitted", "selector": joint | {"ranks": ranks}}})
        for ranks in ("greedy", "knapsack")
    )
    assert greedy == old != knapsack
    assert records.identity({"seed": 0, "ranks": "greedy"}) == {"seed": 0, "ranks": "greedy"}  # of a Joint only


@pytest.mark.parametrize("name", ["Compact", "Lossless"])
def test_a_renamed_setting_is_signed_by_the_name_that_records_have(name: str) -> None:
    old, new = (
        records.identity({"_target_": f"spectrim.algorithms.any.{name}", setting: 0.1})
        for setting in ("budget", "verified_tolerance")
    )
    assert new == old == {"_class_": name, "budget": 0.1}


def test_a_record_of_the_first_schema_is_read_and_keeps_both_signatures(tmp_path: Path) -> None:
    settings = {"model": {"_target_": "spectrim.models.resnet.ResNet", "depth": 20}, "seed": 0}
    old = record() | {"schema": 1, "config": settings, "signature": "a" * 16}
    path = records.path_of(tmp_path, old["experiment"], old["signature"])
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(old))
    read = records.read(path)
    assert read["config"]["model"] == {"_class_": "ResNet", "depth": 20} and read["former_signature"] == "a" * 16
    assert read["signature"] == records.signature(read["config"])
    records.write(tmp_path, read)
    path.unlink()
    assert records.read_all(tmp_path, old["experiment"]) == [read]
