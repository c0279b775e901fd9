"""Tracking by MLflow, read back by its own client; and a server that never answers."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from spectrim.runs.tracking import followed, mlflow_runs
from spectrim.runs.tracking.followed import Followed
from spectrim.runs.tracking.mlflow_runs import MLflow
from spectrim.runs.tracking.session import About, Results

client = pytest.importorskip("mlflow.tracking", reason="needs pip install 'spectrim[mlflow]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow about its own code
ABOUT = About("0" * 16, "mlp-digits", "table2", "lossless", ("mlp",), {"model": {"hidden": [16]}})


@pytest.fixture(autouse=True)
def _not_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)  # where MLflow puts the files of the results
    followed.GIVEN_UP.clear()
    yield
    followed.GIVEN_UP.clear()


@pytest.mark.parametrize(("status", "state"), [(0, "FINISHED"), (1, "FAILED"), (143, "KILLED")])
def test_a_run_is_kept_with_its_numbers_files_and_state(status: int, state: str, tmp_path: Path) -> None:
    pytest.importorskip("sqlalchemy", reason="needs the whole package mlflow")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    session = MLflow(uri=uri).start(ABOUT)
    session.log({"loss": 0.5, "epoch": 3.0}, "epoch")
    layers = pd.DataFrame({"layer": ["fc"], "rank": [3]})
    results = Results([], {"test/loss": 1.5, "commit": "c0ffee"}, {"layers": layers}, {"plan.json": b"{}"})
    session.finish(None if status else results, status)
    read = client.MlflowClient(uri)
    (run,) = read.search_runs([read.get_experiment_by_name("spectrim").experiment_id])
    assert run.info.status == state and run.data.params == {"model.hidden": "[16]"}
    assert [(one.step, one.value) for one in read.get_metric_history(run.info.run_id, "loss")] == [(3, 0.5)]
    if not status:
        assert run.data.metrics["summary/test/loss"] == 1.5 and run.data.tags["commit"] == "c0ffee"
        assert {one.path for one in read.list_artifacts(run.info.run_id)} == {"layers.csv", "plan.json"}


def test_a_server_that_never_answers_costs_its_patience_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(mlflow_runs.RETRIES))
    began = time.monotonic()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        run = Followed(MLflow(uri=f"http://127.0.0.1:{silent.getsockname()[1]}"), ABOUT)
    assert not run.finish(Results())
    assert "spectrim: warning: MLflow tracking is off from here on" in capsys.readouterr().err
    assert time.monotonic() - began < 30
