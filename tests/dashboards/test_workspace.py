"""The dashboard is composed without a network, and shows what runs tell."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from spectrim.cli import run, tracked_values

SCRIPT = Path(__file__).resolve().parents[2] / "dashboards" / "workspace.py"


@pytest.fixture
def script() -> Any:
    spec = importlib.util.spec_from_file_location("workspace", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_the_package_the_extra_is_named(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert script.main(["--print"]) == 1
    said = capsys.readouterr().err
    assert "spectrim[dashboards]" in said and said.count("\n") == 1


@pytest.mark.filterwarnings("ignore")  # of wandb-workspaces about its own code
class TestComposed:
    @pytest.fixture
    def made(self, script: Any, capsys: pytest.CaptureFixture[str]) -> list[Any]:
        pytest.importorskip("wandb_workspaces", reason="needs pip install 'spectrim[dashboards]'")
        assert script.main(["--print", "--entity", "mylab"]) == 0
        return json.loads(capsys.readouterr().out)

    def test_there_is_a_workspace_and_a_report_for_each_table(self, script: Any, made: list[Any]) -> None:
        workspace, *reports = made
        assert [one["displayName"] for one in reports] == [f"spectrim {name}" for name in script.tables()]
        assert reports and workspace["entity"] == "mylab"
        sections = workspace["spec"]["section"]["panelBankConfig"]["sections"]
        assert [one["name"] for one in sections[:5]] == list(script.panels())

    def test_a_report_holds_its_table_and_its_claims(self, made: list[Any]) -> None:
        (table2,) = [one for one in made if one["displayName"] == "spectrim table2"]
        text = json.dumps(table2)
        assert "Claims and verdicts" in text and "does not hold" in text and "params_kept" in text
        assert re.search(r'"group".{0,200}"table2"', text)

    def test_every_number_on_a_panel_is_one_that_runs_tell(
        self, made: list[Any], compose: Any, digits: list[str]
    ) -> None:
        results = tracked_values.of_run(run.run(compose(*digits, "algorithm=truncation")))
        shown = set(re.findall(r'"summary(?::|_metrics\.)([^"]+)"', json.dumps(made)))
        assert len(shown) > 8 and shown <= results.summary.keys() and "layers" in results.tables
