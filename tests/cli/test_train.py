"""``spectrim-train`` writes, whole or not at all, what ``spectrim`` reads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spectrim.checkpoints import single_file
from spectrim.cli import run, train
from spectrim.errors import UserError
from spectrim.factored.plan import RankPlan
from spectrim.runs import configuration, targets


@pytest.fixture
def folder(tmp_path: Path) -> list[str]:
    return ["data=digits", "model=mlp", "model.hidden=[16,16]", f"checkpoints={tmp_path}/checkpoints"]


@pytest.fixture
def training(folder: list[str], tmp_path: Path) -> list[str]:
    return [*folder, "recipe=mlp", "recipe.epochs=2", f"unfinished={tmp_path}/unfinished"]


@pytest.fixture
def trained(compose: Any, training: list[str]) -> Path:
    return train.train(compose(*training, name="train"))


def test_a_run_meets_the_net_that_was_trained(compose: Any, folder: list[str], trained: Path, tmp_path: Path) -> None:
    record = run.run(compose(*folder, "algorithm=truncation", f"records={tmp_path}/records"))
    report = json.loads(trained.with_suffix(".json").read_text())
    assert record["dense"]["test"] == pytest.approx(report["test"])
    assert record["dense"]["params"] == report["params"] and len(report["curve"]) == 2
    assert record["config"]["checkpoint"] == record["provenance"]["checkpoint_digest"]
    assert sorted(path.name for path in trained.parent.iterdir()) == [
        "mlp-digits-seed0.json",
        "mlp-digits-seed0.safetensors",
    ]


def test_a_trained_net_is_left_alone(compose: Any, training: list[str], trained: Path, tmp_path: Path) -> None:
    before = (trained.stat().st_mtime_ns, trained.read_bytes())
    left = tmp_path / "unfinished" / f"{trained.stem}.state.safetensors"
    left.touch()  # as a kill right after the checkpoint does
    assert train.train(compose(*training, name="train")) == trained and not left.exists()
    assert (trained.stat().st_mtime_ns, trained.read_bytes()) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [("''", "checkpoint='' is not text"), (".", "a folder or a device"), ("file/x.safetensors", "Not a directory")],
)
def test_a_checkpoint_that_cannot_be_written_is_refused_before_the_training(
    compose: Any, training: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    monkeypatch.setattr(train, "fit", lambda *_, **__: pytest.fail("it was trained"))
    with pytest.raises(UserError, match=message) as refusal:
        train.train(compose(*training, f"checkpoint={name}", name="train"))
    assert "\n" not in str(refusal.value)


def test_another_file_in_its_place_is_another_run(
    compose: Any, folder: list[str], trained: Path, tmp_path: Path
) -> None:
    asked = (*folder, "algorithm=truncation", f"records={tmp_path}/records")
    first = run.run(compose(*asked))
    model = targets.build(configuration.plain(compose(*asked).model))
    single_file.save(trained, model, RankPlan())
    second = run.run(compose(*asked))
    assert first["signature"] != second["signature"]
    assert first["dense"]["test"]["loss"] != second["dense"]["test"]["loss"]


def test_float16_is_said_and_stored(compose: Any, training: list[str]) -> None:
    path = train.train(compose(*training, "stored_as=float16", name="train"))
    assert {value.dtype for value in load_file(path).values()} == {torch.float16}
    assert json.loads(path.with_suffix(".json").read_text())["stored_as"] == "float16"


def test_a_net_that_diverges_is_said_in_one_line(compose: Any, training: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lower lr; the last good state is"):
        train.train(compose(*training, "recipe.lr=1e20", name="train"))
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_net_of_other_channels_than_the_images_is_said_in_one_line(compose: Any, training: list[str]) -> None:
    asked = [one for one in training if not one.startswith("model")]
    with pytest.raises(UserError, match="at layer .*channels, but got 1 channels instead") as refusal:
        train.train(compose(*asked, "model=resnet20", "shape.in_channels=3", name="train"))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("seed", ["true", "1.5", "one", "-1", str(2**63)])
def test_a_seed_that_is_no_whole_number_is_refused(compose: Any, training: list[str], seed: str) -> None:
    with pytest.raises(UserError, match=r"^seed=.* is not a whole number in 0\.\.4294967295$"):
        train.train(compose(*training, f"seed={seed}", name="train"))


@pytest.mark.parametrize("setting", ["threads=0", "threads=two", "threads=true", "checkpoint=null", "unfinished=null"])
def test_a_setting_of_the_wrong_kind_is_named_before_the_training(
    compose: Any, training: list[str], setting: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"^{setting.partition('=')[0]}=.* is not "):
        train.train(compose(*training, setting, name="train"))
    assert not list(tmp_path.iterdir())


def test_an_unknown_precision_is_refused_before_the_training(compose: Any, training: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stored_as is float32 or float16, got int8"):
        train.train(compose(*training, "stored_as=int8", name="train"))
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_is_missing_cut_altered_or_of_another_net_is_refused(
    compose: Any, folder: list[str], trained: Path, tmp_path: Path
) -> None:
    base, whole = [*folder, f"records={tmp_path}/records"], trained.read_bytes()
    with pytest.raises(UserError, match="make it by `spectrim-train model=mlp data=digits seed=7"):
        run.run(compose(*base, "seed=7"))
    with pytest.raises(UserError, match="of another architecture"):
        run.run(compose(*base, "model.hidden=[16,18]"))
    trained.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="cut short"):
        run.run(compose(*base))
    trained.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="altered"):
        run.run(compose(*base))
    assert not [path for path in (tmp_path / "records").rglob("*") if path.is_file()]
