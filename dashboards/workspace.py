"""Lay out a dashboard of Weights & Biases: a workspace for all runs, and a report for each table.

    python dashboards/workspace.py --print                     print them as JSON, without a network
    python dashboards/workspace.py --entity TEAM               make them on the server

The panels show what ``tracking=wandb`` told. The reports also hold the tables and the verdicts on the claims, as they
were made from the records.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spectrim.errors import UserError
from spectrim.tools import extras

RESULTS = Path(__file__).resolve().parents[1] / "results" / "tables"
SPLITS = {"test": "Test", "calibration": "Calibration"}


def _library(part: str) -> Any:
    """Return a module of wandb-workspaces. Raises ``UserError`` where it is not installed."""
    # W&B reads it when it is imported: error reports look up a host name.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    return extras.imported(f"wandb_workspaces.{part}", "dashboards", "a dashboard")


def panels() -> dict[str, list[Any]]:
    """Return the panels by section."""
    reports = _library("reports.v2")

    def frontier(measure: str) -> Any:
        return reports.ScatterPlot(
            title=f"{measure} against size",
            x=reports.SummaryMetric("params_kept"),
            y=reports.SummaryMetric(f"test/{measure}"),
        )

    lines = {"Trainings": "progress/train/loss", "Accuracy while training": "progress/train/accuracy"}
    seconds = [reports.SummaryMetric(f"phases/{phase}/seconds") for phase in ("load", "select", "evaluate")]
    return {
        "Frontier": [frontier("accuracy"), frontier("loss")],
        "Change by the compression": [
            reports.BarPlot(title=f"{name} {measure}", metrics=[reports.SummaryMetric(f"{split}/{measure}_change")])
            for split, name in SPLITS.items()
            for measure in ("loss", "accuracy")
        ],
        "Ranks of the layers": [reports.WeavePanelSummaryTable(table_name="layers")],
        "While it runs": [
            reports.LinePlot(title=title, x="progress/train/done", y=[metric]) for title, metric in lines.items()
        ],
        "Time": [reports.BarPlot(title="Seconds of each phase", metrics=seconds)],
    }


def workspace(entity: str, project: str) -> Any:
    """Return the workspace for all runs of a project."""
    workspaces = _library("workspaces")
    sections = [workspaces.Section(name=name, panels=found, is_open=True) for name, found in panels().items()]
    return workspaces.Workspace(entity=entity, project=project, name="Runs of spectrim", sections=sections)


def report(name: str, entity: str, project: str) -> Any:
    """Return the report of a table: its panels over the runs of its grids, the table, and the verdicts."""
    reports = _library("reports.v2")
    # Without a project of its own it shows the runs of the report's, and asks no server for it.
    runs = reports.Runset(name=name, filters=f"Metric('group') == '{name}'")
    shown = panels()
    blocks = [reports.H1(f"{name.capitalize()}: frontier")]
    blocks += [reports.PanelGrid(runsets=[runs], panels=shown["Frontier"])]
    blocks += [reports.H1("Ranks of the layers")]
    blocks += [reports.PanelGrid(runsets=[runs], panels=shown["Ranks of the layers"])]
    for title, file in (("Table", f"{name}.md"), ("Claims and verdicts", f"{name}_claims.md")):
        if (RESULTS / file).is_file():
            text = (RESULTS / file).read_text(encoding="utf-8")
            blocks += [reports.H1(title), reports.MarkdownBlock(text)]
    return reports.Report(entity=entity, project=project, title=f"spectrim {name}", blocks=blocks)


def tables() -> list[str]:
    """Return the names of the tables."""
    return sorted(path.stem for path in RESULTS.glob("table*.csv") if path.stem.removeprefix("table").isdigit())


def main(arguments: Sequence[str] | None = None) -> int:
    """Make or print the dashboard. Return the exit status."""
    parser = argparse.ArgumentParser(description="Lay out a dashboard of Weights & Biases.")
    parser.add_argument("--entity", default="", help="account or team (default: the one that is logged in)")
    parser.add_argument("--project", default="spectrim", help="default: %(default)s")
    parser.add_argument("--print", action="store_true", help="print the dashboard as JSON, and send nothing")
    options = parser.parse_args(arguments)
    try:
        made = [workspace(options.entity, options.project)]
        made += [report(name, options.entity, options.project) for name in tables()]
    except UserError as error:
        print(f"workspace.py: {error}", file=sys.stderr)
        return 1
    if options.print:
        print(json.dumps([one._to_model().model_dump(mode="json", by_alias=True) for one in made], indent=1))
        return 0
    for one in made:
        one.save()
        print(one.url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
