"""A run is told to its tracker from start to end, and once to each place; the record is there whatever happens."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from spectrim.cli import run, train
from spectrim.cli.termination import STATUS, Terminated
from spectrim.errors import UserError
from spectrim.runs.tracking import followed
from spectrim.runs.tracking.session import About, Results
from spectrim.runs.tracking.wandb_runs import WandB
from spectrim.tools import files

SVD_TRAINING = ("algorithm=svd_training_plain", "algorithm.recipe.epochs=2")


class Server:
    """Takes the place of W&B, and keeps what it is told of each run."""

    def __init__(self) -> None:
        self.away = False
        self.runs: list[About] = []
        self.logged: list[Mapping[str, float]] = []
        self.ended: list[tuple[Results | None, int]] = []

    def start(self, about: About) -> "Server":
        if self.away:
            raise OSError("no server")
        self.runs.append(about)
        return self

    def log(self, numbers: Mapping[str, float], axis: str) -> None:
        assert axis in numbers
        self.logged.append(numbers)

    def finish(self, results: Results | None, status: int) -> None:
        self.ended.append((results, status))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    kept = Server()
    monkeypatch.setattr(WandB, "start", lambda _, about: kept.start(about))
    followed.GIVEN_UP.clear()
    yield kept
    followed.GIVEN_UP.clear()


@pytest.fixture
def asked(digits: list[str]) -> tuple[str, ...]:
    return (*digits, "algorithm=truncation", "tracking=wandb")


def test_a_run_is_told_with_its_names_numbers_and_files(compose: Any, asked: Any, server: Server) -> None:
    record = run.run(compose(*asked))
    (about,), ((results, status),) = server.runs, server.ended
    assert about.signature == record["signature"] and about.group == "runs" and about.kind == "truncation"
    assert {"runs", "mlp", "digits", "svd_channel", "truncation"} == set(about.tags)
    assert about.settings["names"] == record["names"] and about.settings["commit"] == record["provenance"]["commit"]
    assert status == 0 and results is not None
    assert results.summary["test/loss_dense"] == record["dense"]["test"]["loss"]
    assert results.summary["test/loss_change"] == results.summary["test/loss"] - results.summary["test/loss_dense"]
    assert results.summary["test/accuracy"] == record["compressed"]["test"]["accuracy"]
    assert results.summary["phases/select/seconds"] == record["phases"]["select"]["seconds"]
    assert list(results.tables["layers"]["layer"]) == [one["layer"] for one in record["layers"]]
    assert json.loads(results.files["record.json"])["signature"] == record["signature"]
    assert json.loads(results.files["plan.json"]) == record["plan"]


def test_a_training_inside_a_run_is_told_epoch_by_epoch(compose: Any, digits: list[str], server: Server) -> None:
    run.run(compose(*digits, *SVD_TRAINING, "tracking=wandb"))
    live = [numbers for numbers in server.logged if "progress/train/loss" in numbers]
    assert [numbers["progress/train/done"] for numbers in live] == [1, 2]


def test_a_run_is_told_once_to_each_place(compose: Any, asked: Any, server: Server) -> None:
    for place in ("offline", "offline", "online", "online"):
        run.run(compose(*asked, f"tracking.mode={place}"))
    assert len(server.ended) == 2  # offline first, and online later
    run.run(compose(*asked, "tracking.entity=others"))
    assert len(server.ended) == 3


def test_what_the_server_missed_it_is_told_by_the_same_command(compose: Any, asked: Any, server: Server) -> None:
    server.away = True
    record = run.run(compose(*asked))
    followed.GIVEN_UP.clear()  # another process
    server.away = False
    assert run.run(compose(*asked)) == json.loads(json.dumps(record))
    assert [about.signature for about in server.runs] == [record["signature"]]


def test_what_was_made_without_tracking_is_told_later(compose: Any, asked: Any, server: Server) -> None:
    record = run.run(compose(*asked, "tracking=none"))
    assert not server.runs
    run.run(compose(*asked))
    assert server.runs[0].signature == record["signature"] and server.ended[0][1] == 0


@pytest.mark.parametrize(
    ("error", "status"), [(UserError("bad"), 1), (KeyboardInterrupt(), 130), (Terminated(), STATUS)]
)
def test_a_run_that_fails_is_told_with_its_exit_status(
    error: BaseException, status: int, compose: Any, asked: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(run, "_found", fail)
    with pytest.raises(type(error)):
        run.run(compose(*asked))
    assert server.ended == [(None, status)]


def test_a_mark_that_cannot_be_written_fails_no_run(
    compose: Any, asked: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = files.write

    def full(contents: Any) -> None:
        if any(path.suffix == ".tracked" for path in contents):
            raise UserError("no room")
        usual(contents)

    monkeypatch.setattr(files, "write", full)
    assert run.run(compose(*asked))["signature"] == server.runs[0].signature


def test_a_training_is_told_live_and_once(compose: Any, server: Server, tmp_path: Path) -> None:
    words = ("data=digits", "model=mlp", "model.hidden=[16]", "recipe=digits", "recipe.epochs=2")
    folders = (f"checkpoints={tmp_path / 'nets'}", f"unfinished={tmp_path}", "threads=1")
    path = train.train(compose(*words, *folders, "tracking=wandb", name="train"))
    (about,), ((results, status),) = server.runs, server.ended
    assert about.kind == "training" and about.group == "nets" and status == 0 and results is not None
    assert [n["progress/train/done"] for n in server.logged if "progress/train/loss" in n] == [1, 2]
    record = json.loads(path.with_suffix(".json").read_text())
    assert results.summary["test/loss"] == record["test"]["loss"] and results.log == record["curve"]
    train.train(compose(*words, *folders, "tracking=wandb", name="train"))
    assert len(server.runs) == 1
    train.train(compose(*words, *folders, "tracking=wandb", "tracking.mode=online", name="train"))
    assert len(server.runs) == 2
