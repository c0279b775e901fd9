"""One run is one record, made once, whole or not at all; every mistake is one line and a status."""

import errno
import hashlib
import json
import math
import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from spectrim.algorithms.shared.workbench import Workbench
from spectrim.algorithms.truncation import Truncation
from spectrim.cli import commands, run
from spectrim.errors import UserError
from spectrim.records import records
from spectrim.runs import configuration, signing, task
from spectrim.tools import resume

QUIET = ["hydra/job_logging=none", "hydra/hydra_logging=none"]  # handlers would outlive a test's streams


class TestRecord:
    @pytest.fixture
    def record(self, compose: Any, digits: list[str]) -> dict:
        return run.run(compose(*digits, "algorithm=truncation", "algorithm.ratio=0.4"))

    def test_it_holds_the_whole_run(self, record: dict, tmp_path: Path) -> None:
        (path,) = tmp_path.rglob("*.json")
        assert path == tmp_path / "runs" / f"{record['signature']}.json"
        assert json.loads(path.read_text()) == json.loads(json.dumps(record))
        assert record["names"] == {
            "model": "mlp",
            "data": "digits",
            "decomposer": "svd_channel",
            "algorithm": "truncation",
        }
        assert record["config"]["algorithm"]["ratio"] == 0.4 and record["config"]["checkpoint"] is None
        assert record["seed"] == record["calibration_seed"] == 0
        for model in (record["dense"], record["compressed"]):
            assert model["calibration"]["n"] == 200 and model["test"]["n"] == 359
            assert math.isfinite(model["test"]["loss"]) and 0 <= model["test"]["accuracy"] <= 1
        assert set(record["phases"]) == {"load", "select", "evaluate"}
        for phase in record["phases"].values():
            assert phase["seconds"] >= 0 and phase["peak_mib"] > 0 and phase["added_mib"] >= 0
        assert set(record["samples_read"]) <= {"calibration"}
        report, whole = record["reporting"], record["phases"]["select"]
        assert 0 <= report["cpu_seconds"] <= whole["cpu_seconds"] and report["seconds"] <= whole["seconds"]
        assert all(count <= record["samples_read"][split] for split, count in report["samples_read"].items())

    def test_its_costs_are_those_counted_by_hand(self, record: dict) -> None:
        weights = [(16, 64), (16, 16), (10, 16)]
        macs = sum(outputs * inputs for outputs, inputs in weights)
        ranks = [max(1, int(0.4 * o * i / (o + i))) for o, i in weights]
        small = sum(rank * (o + i) for rank, (o, i) in zip(ranks, weights, strict=True))
        assert (record["dense"]["params"], record["dense"]["macs"]) == (macs + 42, macs)
        assert (record["compressed"]["params"], record["compressed"]["macs"]) == (small + 42, small)
        assert [layer["rank"] for layer in record["layers"]] == ranks
        assert {name: entry["rank"] for name, entry in record["plan"].items()} == {
            layer["layer"]: layer["rank"] for layer in record["layers"]
        }

    def test_a_recorded_run_is_not_done_again(
        self, record: dict, compose: Any, digits: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def again(*_: object) -> None:
            raise AssertionError("compressed again")

        monkeypatch.setattr(Truncation, "compress", again)
        asked = (*digits, "algorithm=truncation", "algorithm.ratio=0.4")
        assert run.run(compose(*asked)) == json.loads(json.dumps(record))
        with pytest.raises(AssertionError, match="compressed again"):
            run.run(compose(*asked, "data.calibration_seed=1"))
        assert len(list(tmp_path.rglob("*.json"))) == 1


class TestWithoutAPlan:
    """An algorithm may change a model without factoring a layer of it."""

    @staticmethod
    def record(compose: Any, digits: list[str], monkeypatch: pytest.MonkeyPatch, change: Any) -> dict:
        def compress(_: Truncation, model: nn.Module, decomposer: Any, objective: Any) -> Any:
            compressed = Workbench.of(model, decomposer, objective).finish({})
            change(compressed.model)
            return compressed

        monkeypatch.setattr(Truncation, "compress", compress)
        record = run.run(compose(*digits, "algorithm=truncation"))
        assert record["plan"] == {}
        return record

    def test_what_was_left_alone_has_the_dense_numbers(self, compose: Any, digits: list[str], monkeypatch: Any) -> None:
        record = self.record(compose, digits, monkeypatch, lambda model: None)
        assert record["compressed"] == record["dense"]

    def test_changed_weights_are_measured(self, compose: Any, digits: list[str], monkeypatch: Any) -> None:
        record = self.record(compose, digits, monkeypatch, lambda model: model.layers[-1].weight.data.zero_())
        assert record["compressed"]["params"] == record["dense"]["params"]
        for split in ("calibration", "test"):
            assert record["compressed"][split]["loss"] != record["dense"][split]["loss"]

    def test_another_layer_is_measured(self, compose: Any, digits: list[str], monkeypatch: Any) -> None:
        def smooth(model: Any) -> None:
            model.layers[2] = nn.Tanh()

        record = self.record(compose, digits, monkeypatch, smooth)
        assert record["compressed"]["test"]["loss"] != record["dense"]["test"]["loss"]


def test_the_command_for_a_missing_checkpoint_makes_that_one(compose: Any, tmp_path: Path) -> None:
    asked = ["data=digits", "model=bias_free_mlp", "model.depth=3", "names.model=deep", f"checkpoints={tmp_path}/a b"]
    cfg = compose(*asked, "seed=4")
    with pytest.raises(UserError, match="make it by `") as refusal:
        run.run(cfg)
    program, *overrides = shlex.split(str(refusal.value).split("`")[1])
    made = compose(*overrides, name="train")
    assert program == "spectrim-train" and made.checkpoint == f"{tmp_path}/a b/deep-digits-seed4.safetensors"
    assert (made.model.depth, made.seed) == (3, 4)


def signature(compose: Any, digits: list[str], *overrides: str) -> str:
    return run.run(compose(*digits, "algorithm=truncation", *overrides))["signature"]


def test_what_changes_the_outcome_changes_the_signature_and_nothing_else(compose: Any, digits: list[str]) -> None:
    same = {
        signature(compose, digits, *o)
        for o in ([], ["name=other"], ["batch_norm=keep"], ["algorithm.ratio=0.50"], ["checkpoints=x"])
    }
    other = [
        ["algorithm.ratio=0.6"],
        ["seed=1"],
        ["data.calibration_size=100"],
        ["decomposer=svd_spatial"],
        ["batch_norm=follow"],
    ]
    assert len(same) == 1
    assert len(same | {signature(compose, digits, *o) for o in other}) == 6


@pytest.mark.parametrize("experiment", ["table2", "table5", "table7", "table8", "figure2", "figure3"])
def test_committed_records_are_those_of_todays_configuration(compose: Any, experiment: str) -> None:
    """A setting that is added later leaves the signatures of the runs that do not use it as they were."""
    (first, *_) = sorted((Path(__file__).parents[2] / "results" / "records" / experiment).glob("*.json"))
    record = json.loads(first.read_text())
    cfg = compose(*configuration.present_names(shlex.split(record["provenance"]["command"])[1:]))
    settings = records.identity(signing.scientific(cfg) | {"checkpoint": record["config"]["checkpoint"]})
    assert settings == record["config"]
    assert records.signature(settings) == record["signature"] == first.stem


def test_the_checkpoint_is_hashed_once_and_its_digest_is_that_of_its_bytes(
    compose: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    usual = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: hashed.append(Path(file.name)) or usual(file, kind))
    cfg = compose(
        "data=digits",
        "model=bias_free_mlp",
        "model.depth=2",
        "names.model=bias_free_mlp2",
        "checkpoints=results/checkpoints/table8",
        f"records={tmp_path}",
        "algorithm=truncation",
    )
    record = run.run(cfg)
    expected = hashlib.sha256(Path(cfg.checkpoint).read_bytes()).hexdigest()
    assert record["provenance"]["checkpoint_digest"] == record["config"]["checkpoint"] == expected
    assert hashed.count(Path(cfg.checkpoint)) == 1


def test_batch_norm_is_recorded_where_it_is_not_the_default(compose: Any, tmp_path: Path) -> None:
    small = ["data=digits", "model=resnet20", "model.depth=8", "data.calibration_size=50", "algorithm=truncation"]
    where = ["checkpoint=null", f"records={tmp_path}"]
    kept, followed = (run.run(compose(*small, *where, f"batch_norm={how}")) for how in ("keep", "follow"))
    assert "batch_norm" not in kept["config"] and followed["config"]["batch_norm"] == "follow"
    assert kept["plan"] == followed["plan"] and kept["predicted_change"] == followed["predicted_change"]
    assert kept["compressed"]["test"]["loss"] != followed["compressed"]["test"]["loss"]


def test_an_algorithm_never_sees_the_test_split(
    compose: Any, digits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    usual = Truncation.compress

    def spied(self: Truncation, model: nn.Module, decomposer: Any, objective: Any) -> Any:
        seen.append(set(objective.splits))
        return usual(self, model, decomposer, objective)

    monkeypatch.setattr(Truncation, "compress", spied)
    run.run(compose(*digits, "algorithm=truncation"))
    assert seen == [{"calibration", "verification", "train"}]


def test_a_full_disk_leaves_no_record(
    compose: Any, digits: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device"):
            run.run(compose(*digits))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert run.run(compose(*digits))["signature"]


def test_a_recorded_run_removes_what_a_kill_right_after_its_record_left(
    compose: Any, digits: list[str], tmp_path: Path
) -> None:
    cfg = compose(*digits, "algorithm=truncation", f"unfinished={tmp_path}")
    left = tmp_path / f"{run.run(cfg)['signature']}.state.safetensors"
    left.touch()
    run.run(cfg)
    assert not left.exists()


def test_a_disk_that_deletes_nothing_costs_no_run(
    compose: Any, digits: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    cfg = compose(*digits, "algorithm=truncation", f"unfinished={tmp_path}/unfinished")
    monkeypatch.setattr(Path, "unlink", refused)
    assert run.run(cfg) == run.run(cfg)


@pytest.mark.parametrize("key", ["records", "unfinished"])
def test_an_output_that_cannot_be_written_is_refused_before_the_selection(
    compose: Any, digits: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(run.task, "load", lambda *_: pytest.fail("the run began"))
    with pytest.raises(UserError, match=r"cannot write .*: Not a directory"):
        run.run(compose(*digits, "algorithm=svd_training", f"{key}={tmp_path}/file/below"))


def test_records_that_cannot_be_written_are_said_in_one_line(
    compose: Any, digits: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(UserError, match=r"cannot write .*: Read-only file system") as refusal:
        run.run(compose(*digits, f"records={tmp_path}/records"))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm=truncation", "algorithm.ratio=0"], "ratio must lie in (0, 1], got 0"),
        (["algorithm=truncation", "algorithm.ratio=1.5"], "ratio must lie in (0, 1], got 1.5"),
        (["algorithm=truncation", "algorithm.ratio=null", "algorithm.rank=-1"], "rank must be at least 1, got -1"),
        (["algorithm=truncation", "algorithm.ratio=null", "algorithm.rank=99"], "rank 99 is above the full rank"),
        (["algorithm=truncation", "algorithm.ratio=null", "algorithm.rank=abc"], "rank='abc' is none of: int, None"),
        (["algorithm=truncation", "algorithm.ratio=null", "algorithm.rank=true"], "rank=True is none of: int, None"),
        (["algorithm=truncation", "algorithm.ratio=nan"], "algorithm.ratio is nan"),
        (["algorithm=nosuch"], "algorithm=nosuch is unknown; known are aimet, alds"),
        (["algorithm=nosuch"], "swift_svd, truncation, truncation_params, zero_sum\n"),
        (["algorithm=null"], "Hydra cannot begin with these settings: "),
        (["+algorithm._partial_=true"], "has no method compress"),
        (["tracking={_target_:torch.nn.ReLU}"], "gives a ReLU, which has no method start"),
        (["data=nosuch"], "data=nosuch is unknown; known are cifar10, digits"),
        (["model.depth=3"], "model.depth is no setting; model has "),
        (["data.calibration_size=0"], "calibration_size must be at least 1"),
        (["data.calibration_size=1000000"], "more than"),
        (["shape.num_classes=5"], "does not fit a model with 5 classes"),
        (["model.hidden=[]"], "an MLP needs at least one hidden layer"),
        (["algorithm._target_=torch.os.system"], "is refused"),
        (["data._target_=subprocess.run"], "is refused"),
        (["tracking._target_=builtins.print"], "is refused"),
        (["batch_norm=refit"], "batch_norm is one of keep, follow, not 'refit'"),
        (["seed=true"], "seed=True is not a whole number"),
        (["seed=abc"], "seed='abc' is not a whole number"),
        (["seed=-1"], "seed=-1 is not a whole number in 0..4294967295"),
        (["seed=99999999999999999999"], "is not a whole number in 0..4294967295"),
        (["data.calibration_seed=99999999999999999999"], "calibration_seed=99999999999999999999 is not a whole"),
        (["name=../elsewhere"], "is not a name"),
        (["name=null"], "name=None is not text"),
        (["records=null"], "records=None is not text"),
        (["checkpoint=[1]"], "checkpoint=[1] is not text"),
        (
            ["experiment=table9/refit"],
            "experiment=table9/refit is a grid over seed, algorithm.refit: add -m, or give each",
        ),
        (["experiment=table9/refit", "seed=0"], "experiment=table9/refit is a grid over algorithm.refit: add -m"),
        (["experiment=table9/refits"], "experiment=table9/refits is no grid: choose table9/refit, table9/"),
        (
            ["experiment=knapsack"],
            "experiment=knapsack is no grid: choose figure4/other_nets/knapsack, table11/knapsack, "
            "table11/resnet20/knapsack\n",
        ),
        (["experiment=table5/"], "experiment=table5/ is a folder of grids: choose table5/lenet5/fine_tuning, "),
        (["experiment=qqqq"], "experiment=qqqq is no grid: the grids lie in "),
        (["checkpoint=/nosuch/file"], "there is no checkpoint at /nosuch/file"),
    ],
)
def test_a_mistake_is_one_line_and_status_1(
    overrides: list[str],
    message: str,
    digits: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(sys, "argv", ["spectrim", *QUIET, *digits, *overrides])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(SystemExit) as ending:
        commands.compress()
    said = capsys.readouterr().err
    assert ending.value.code == 1
    assert message in said and said.startswith("spectrim: ") and said.count("\n") == 1
    assert not list(tmp_path.rglob("*.json"))


def test_a_former_name_of_a_grid_runs_it_and_says_the_present_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    small = ["model.depth=2", "seed=0", f"records={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["spectrim", *QUIET, "experiment=table8_untrained", *small])
    commands.compress()
    assert (
        "spectrim: experiment=table8_untrained is named experiment=table8/bounds_untrained now\n"
        in capsys.readouterr().err
    )
    (record,) = records.read_all(tmp_path, "table8")
    committed = Path(__file__).parents[2] / "results" / "records" / "table8" / f"{record['signature']}.json"
    assert committed.is_file() and "experiment=table8/bounds_untrained" in record["provenance"]["command"]


def test_blocks_of_layers_change_neither_the_plan_nor_the_signature(compose: Any, digits: list[str]) -> None:
    asked = (*digits, "algorithm=joint", "algorithm.samples=30", "decomposer=whitened_channel")
    whole = run.run(compose(*asked))
    path = next(Path(compose(*asked).records).rglob("*.json"))
    path.unlink()
    apart = run.run(compose(*asked, "layers_at_once=1"))
    assert apart["signature"] == whole["signature"] and apart["config"] == whole["config"]
    assert apart["samples_read"]["calibration"] > whole["samples_read"]["calibration"]
    assert apart["plan"] == whole["plan"]
    for one, other in zip(apart["log"], whole["log"], strict=True):
        assert one == pytest.approx(other, rel=1e-5)  # a layer at full rank differs from a dense one by rounding


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Flatten what a record holds."""
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for at, one in inner for key, leaf in leaves(one, f"{name}.{at}").items()}
    return {name: value}


def test_runs_share_a_folder_of_results_without_an_effect_on_their_records(
    compose: Any, digits: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "WORTH_SECONDS", 0)
    asked = (*digits, "algorithm=joint", "algorithm.samples=30", "decomposer=whitened_channel")
    timed = {"phases", "provenance", "reporting", records.SEAL}

    def measured(size: float, *more: str) -> dict[str, Any]:
        for cache in (task._cached, task._model):  # as in another process
            cache.cache_clear()
        record = run.run(compose(*asked, f"algorithm.params_kept={size}", *more))
        next(Path(compose(*asked).records).rglob(f"{record['signature']}.json")).unlink()
        return leaves({key: value for key, value in record.items() if key not in timed})

    alone, shared = measured(0.5), f"resume={tmp_path / 'shared'}"
    assert not (tmp_path / "shared").exists()
    near = partial(pytest.approx, rel=1e-5, abs=1e-6)  # what lies elsewhere in memory is rounded otherwise
    same = {name: near(value) if isinstance(value, float) else value for name, value in alone.items()}
    assert measured(0.5, shared) == same
    kept = {path.name for path in (tmp_path / "shared").iterdir()}
    assert {name.partition("-")[0] for name in kept} >= {"whitened", "gates", "gradients", "fit"}
    measured(0.6, shared)
    more = {path.name for path in (tmp_path / "shared").iterdir()} - kept
    assert {name.partition("-")[0] for name in more} == {"fit"}  # of other ranks; the rest serves every size
    assert measured(0.5, shared) == same


def test_blocks_that_cannot_be_are_refused(compose: Any, digits: list[str]) -> None:
    with pytest.raises(UserError, match="layers_at_once must be a whole number of at least 1"):
        run.run(compose(*digits, "algorithm=truncation", "layers_at_once=0"))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"loss": ', '"loss": 1', "was altered: delete it and run its experiment again"),
        ('"loss": ', '"loss": NaN, "former": ', "is cut short or not JSON: delete it"),
        ('"ratio": 0.4', '"ratio": 0.5', "was altered: delete it"),
    ],
)
def test_an_altered_record_is_not_taken_for_the_run(
    old: str, new: str, said: str, compose: Any, digits: list[str], tmp_path: Path
) -> None:
    words = [*digits, "algorithm=truncation", "algorithm.ratio=0.4"]
    run.run(compose(*words))
    (path,) = tmp_path.rglob("*.json")
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=said):
        run.run(compose(*words))


def test_a_record_without_a_seal_must_be_of_its_configuration(compose: Any, digits: list[str], tmp_path: Path) -> None:
    words = [*digits, "algorithm=truncation", "algorithm.ratio=0.4"]
    record = run.run(compose(*words))
    (path,) = tmp_path.rglob("*.json")
    old = {key: value for key, value in record.items() if key != records.SEAL}
    path.write_bytes(records.encode(old))
    assert run.run(compose(*words)) == json.loads(json.dumps(old))
    old["config"] = {**old["config"], "algorithm": {**old["config"]["algorithm"], "ratio": 0.5}}
    path.write_bytes(records.encode(old))
    with pytest.raises(UserError, match="is of another configuration than its signature says"):
        run.run(compose(*words))
