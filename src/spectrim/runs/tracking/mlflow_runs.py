"""Tracking by MLflow."""

import os
from collections.abc import Mapping
from typing import Any, ClassVar

from spectrim.runs.tracking.session import About, Results
from spectrim.tools import extras
from spectrim.tools.settings import settings

# Seconds that MLflow waits for its server, and how often it asks again. Its own defaults add up to many minutes.
PATIENCE, RETRIES = 15, 1
LONGEST_PARAMETER = 6000  # characters, a limit of MLflow
STATES = {0: "FINISHED", 130: "KILLED", 143: "KILLED"}


@settings
class MLflow:
    """Tracking by MLflow.

    ``uri``: address of a server, or a database in a file.
    ``experiment``: its name for all runs of this project.
    """

    label: ClassVar[str] = "MLflow"
    uri: str = "sqlite:///build/mlflow.db"
    experiment: str = "spectrim"

    def start(self, about: About) -> "MLflowRun":
        """Begin a run. A run that is told again is a further run with the same tag ``signature``."""
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(PATIENCE))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(RETRIES))
        client = extras.imported("mlflow.tracking", "mlflow", "tracking=mlflow").MlflowClient(self.uri)
        found = client.get_experiment_by_name(self.experiment)
        home = found.experiment_id if found else client.create_experiment(self.experiment)
        tags = {"signature": about.signature, "group": about.group, "kind": about.kind, "tags": " ".join(about.tags)}
        run = client.create_run(home, run_name=about.name, tags=tags).info.run_id
        for name, value in _flat(about.settings).items():
            client.log_param(run, name, str(value)[:LONGEST_PARAMETER])
        return MLflowRun(client, run)


class MLflowRun:
    """One run of MLflow."""

    def __init__(self, client: Any, run: str) -> None:
        self.client, self.run = client, run

    def log(self, numbers: Mapping[str, float], axis: str) -> None:
        for name, value in numbers.items():
            if name != axis:
                self.client.log_metric(self.run, name, value, step=round(numbers[axis]))

    def finish(self, results: Results | None, status: int) -> None:
        if results:
            for name, value in results.summary.items():
                if isinstance(value, int | float):
                    self.client.log_metric(self.run, f"summary/{name}", value)
                else:
                    self.client.set_tag(self.run, name, str(value))
            for name, frame in results.tables.items():
                self.client.log_text(self.run, frame.to_csv(index=False), f"{name}.csv")
            for name, content in results.files.items():
                self.client.log_text(self.run, content.decode(), name)
        self.client.set_terminated(self.run, STATES.get(status, "FAILED"))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one mapping, such as ``model.depth``."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
