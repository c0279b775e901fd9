"""A language model through the command line's own path: on a corpus, and as a classifier."""

import json
from pathlib import Path
from typing import Any

import pytest

from spectrim.cli.run import run
from spectrim.cli.train import train
from spectrim.data import imdb

SIZES = {"context": 8, "held_out": 12, "calibration_size": 2, "verification_size": 2, "test_size": 3}


@pytest.fixture
def given(word_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides for a run of seconds on a tiny GPT-2 and forty reviews."""
    reviews = imdb.divided({f"review w{n} is w{n % 7}": n % 2 for n in range(40)}, 15)
    monkeypatch.setattr(imdb, "reviews", lambda: reviews)
    sizes = [f"data.{key}={value}" for key, value in SIZES.items()]
    return [f"model.name={word_folder}", f"records={tmp_path / 'records'}", *sizes]


@pytest.mark.parametrize("algorithm", ["truncation algorithm.ratio=0.5", "lossless algorithm.gamma=null", "joint"])
def test_a_language_model_is_run_and_recorded(compose: Any, given: list[str], algorithm: str) -> None:
    record = run(compose("model=smollm2", "data=imdb_corpus", *given, *f"algorithm={algorithm}".split()))
    assert record["dense"]["test"]["n"] == 3 * 7 and record["dense"]["test"]["accuracy"] is None
    assert record["notes"][0].startswith("imdb_corpus in blocks of 8 tokens")
    assert any(note.startswith("lm_head: left dense: its weight is shared with another") for note in record["notes"])
    assert record["compressed"]["params"] < record["dense"]["params"]


def test_a_classifier_is_run_and_recorded(compose: Any, given: list[str]) -> None:
    record = run(compose("model=minilm", "data=imdb", "checkpoint=null", *given, "algorithm=lossless_verified"))
    assert record["dense"]["test"]["n"] == 3 and record["dense"]["test"]["accuracy"] is not None


def test_a_folder_like_those_of_the_hub_is_run_and_recorded(
    compose: Any, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "task").mkdir()
    for part, count in (("train", 20), ("validation", 5)):
        rows = [json.dumps({"sentence": f"review w{n}", "label": n % 2}) + "\n" for n in range(count)]
        (tmp_path / "task" / f"{part}.jsonl").write_text("".join(rows))
    folder = [f"data.dataset={tmp_path / 'task'}", "data.subset="]
    record = run(compose("model=minilm", "data=glue", "checkpoint=null", *given, *folder, "algorithm=truncation"))
    assert record["dense"]["test"]["n"] == 3 and record["names"]["data"] == "glue"
    assert record["notes"][0].startswith(f"{tmp_path / 'task'}, texts cut off after 8 tokens")


@pytest.fixture
def squad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides for a folder of the form that SQuAD has."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "task").mkdir()
    for part, count in (("train", 20), ("validation", 5)):
        rows = [
            {"question": f"is w{n}", "context": f"w{n} is", "answers": {"text": [f"w{n}"], "answer_start": [0]}}
            for n in range(count)
        ]
        (tmp_path / "task" / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"data.dataset={tmp_path / 'task'}", "data=squad", "model=minilm_answers"]


@pytest.mark.parametrize("algorithm", ["truncation", "lossless_verified", "joint"])
def test_answers_are_found_measured_and_recorded(
    compose: Any, given: list[str], squad: list[str], algorithm: str
) -> None:
    record = run(compose(*given, *squad, "checkpoint=null", f"algorithm={algorithm}"))
    assert record["dense"]["test"]["n"] == 3 and 0 <= record["dense"]["test"]["accuracy"] <= 1
    assert record["notes"][0].endswith("verification 2, test 3") and "questions cut off" in record["notes"][0]


def test_what_finds_answers_is_trained(compose: Any, given: list[str], squad: list[str], tmp_path: Path) -> None:
    given = [one for one in given if not one.startswith("records=")]
    kept = [f"checkpoint={tmp_path / 'x.safetensors'}", f"unfinished={tmp_path}"]
    settings = ["recipe.epochs=20", "recipe.lr=0.1", "recipe.batch_size=4", *kept]
    path = train(compose(*given, *squad, *settings, name="train"))
    curve = json.loads(path.with_suffix(".json").read_text())["curve"]
    assert curve[-1]["loss"] < curve[0]["loss"] / 2


def test_a_classifier_is_trained(compose: Any, given: list[str], tmp_path: Path) -> None:
    given = [one for one in given if not one.startswith("records=")]
    kept = [f"checkpoint={tmp_path / 'x.safetensors'}", f"unfinished={tmp_path}"]
    settings = ["recipe.epochs=2", "recipe.batch_size=4", *kept]
    assert train(compose("model=minilm", "data=imdb", *given, *settings, name="train")).is_file()
