"""The report: every link leads to a page, every run has its command, and nothing comes from the network."""

import csv
import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from spectrim.errors import UserError
from spectrim.report.site import runs, tables
from spectrim.report.site.build import build

RESULTS = Path(__file__).resolve().parents[3] / "results"
REMOTE = re.compile(r"""(src|href)=["']?(https?:)?//|url\(|@import|fetch\(""")
LINK = re.compile(r'(?:href|src)="([^"]+)"')


def test_every_link_leads_to_a_file_of_the_report(report: Path) -> None:
    count = 0
    for page in report.rglob("*.html"):
        for link in LINK.findall(page.read_text(encoding="utf-8")):
            if link != "data:,":
                assert (page.parent / link).is_file(), f"{page}: {link}"
                count += 1
    assert count > 300


def test_the_front_page_has_claims_verdicts_and_every_table(report: Path) -> None:
    text = (report / "index.html").read_text(encoding="utf-8")
    with (RESULTS / "tables" / "table2_claims.csv").open(encoding="utf-8", newline="") as stream:
        verdicts = [row["verdict"] for row in csv.DictReader(stream)]
    assert f"{verdicts.count('does not hold')} does not hold</b>" in text
    assert all(f'href="tables/{name}.html"' in text for name in ("table2_claims", "table8_selection", "figure2"))
    assert "at the δ of Theorem 2: holds" in text  # a verdict in a note of another table


def test_a_table_shows_what_is_committed_with_the_runs_of_each_row(report: Path) -> None:
    shown = {table.name: table for table in tables.read_all(RESULTS)}["table8_selection"]
    with (RESULTS / "tables" / "table8_selection.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row.records for row in shown.rows] == [row["records"].split() for row in rows]
    assert [row.cells[0] for row in shown.rows] == [row["depth"] for row in rows]  # a group is written in every row
    page = (report / "tables" / "table8_selection.html").read_text(encoding="utf-8")
    assert page.count("<tr>") == 1 + len(rows)
    assert all(f'href="../runs/{name}.html"' in page for row in shown.rows for name in row.records)
    assert "|Δ loss| &lt; ε at the δ" in page  # a note that begins as a table does


def test_a_figure_shows_its_picture(report: Path) -> None:
    assert 'src="../figures/figure2.png"' in (report / "tables" / "figure2.html").read_text(encoding="utf-8")
    assert (report / "figures" / "figure2.png").read_bytes() == (RESULTS / "figures" / "figure2.png").read_bytes()


def test_a_run_has_command_numbers_settings_and_provenance(report: Path) -> None:
    path = sorted((report / "runs" / "figure2").glob("*.html"))[0]
    record = json.loads((RESULTS / "records" / "figure2" / f"{path.stem}.json").read_text())
    text = unescape(path.read_text(encoding="utf-8"))
    assert f">{record['provenance']['command']}</pre>" in text
    assert f"{record['compressed']['params']:,}" in text and record["provenance"]["data_digest"] in text
    assert text.count("<rect") == 2 * len(record["layers"])
    assert "<th>data.calibration_size</th>" in text and '<a href="../../tables/figure2.html">Figure 2</a>' in text


def test_numbers_of_a_run(record: Callable[..., Any]) -> None:
    found = record()
    rows = {row[0]: row[1:] for row in runs.measured(found)}
    assert rows["test loss (nats)"][1] == f"{found['compressed']['test']['loss']:.4f}"
    assert rows["parameters"][2].endswith("% kept")
    found["dense"]["test"]["accuracy"] = found["compressed"]["test"]["accuracy"] = None  # a language model
    assert "test top-1 (%)" not in {row[0] for row in runs.measured(found)}


def test_the_bar_of_a_layer() -> None:
    layer = {"layer": "fc", "full_rank": 40, "break_even": 20, "rank": 10}
    assert runs.bar(layer) | {"layer": "fc", "dense": False, "said": "10 of 40"} == runs.bar(layer)
    assert (runs.bar(layer)["kept"], runs.bar(layer)["even"]) == (runs.BAR / 4, runs.BAR / 2)
    whole = runs.bar(layer | {"rank": None})
    assert (whole["dense"], whole["kept"], whole["said"]) == (True, runs.BAR, "dense (40)")


def test_a_long_log_is_cut_and_says_so() -> None:
    found = runs.steps([{"step": at, "ranks": [1, 2], "loss": None} for at in range(runs.STEPS + 5)])
    assert found["keys"] == ["step", "loss"] and found["left"] == 5
    assert found["rows"][3] == ["3", "–"]


def test_nothing_is_loaded_from_the_network(report: Path) -> None:
    for path in report.rglob("*.*"):
        if path.suffix in {".html", ".css", ".js"}:
            assert not REMOTE.search(path.read_text(encoding="utf-8")), path
    assert len((report / "report.js").read_text(encoding="utf-8").splitlines()) < 200


def test_a_report_replaces_a_report_and_nothing_else(report: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert build(RESULTS, out, ["figure2"]) == build(RESULTS, out, ["figure2"]) > 2
    other = tmp_path / "mine"
    other.mkdir()
    with pytest.raises(UserError, match="exists and is no report: choose another folder"):
        build(RESULTS, other, ["figure2"])


def test_a_record_that_is_missing_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    for end in ("csv", "md"):
        name = f"figure2.{end}"
        (tmp_path / "tables" / name).write_bytes((RESULTS / "tables" / name).read_bytes())
    with pytest.raises(UserError, match="cannot read the record .*records/figure2"):
        build(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with (tmp_path / "tables" / "figure2.csv").open("a") as stream:
        stream.write("one more row\n")
    with pytest.raises(UserError, match="have other rows: build the table anew"):
        build(tmp_path, tmp_path / "out")


def test_a_table_without_its_markdown_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "table1.csv").write_text("a\n1\n")
    with pytest.raises(UserError, match=r"cannot read .*table1\.md: No such file or directory; build the table anew"):
        build(tmp_path, tmp_path / "out")
    (tmp_path / "tables" / "table1.md").write_text("**A caption alone**\n")
    with pytest.raises(UserError, match=r"table1\.md is no table: build it anew"):
        build(tmp_path, tmp_path / "out")


def test_an_unknown_name_is_refused_and_leaves_an_older_report(tmp_path: Path) -> None:
    out = tmp_path / "out"
    build(RESULTS, out, ["figure2"])
    with pytest.raises(UserError, match="no table or figure is called tabel2; choose from: table1 .*figure8"):
        build(RESULTS, out, ["figure2", "tabel2"])
    assert (out / "tables" / "figure2.html").is_file()


def test_a_record_in_the_folder_of_another_experiment_is_named(tmp_path: Path) -> None:
    for folder in ("tables", "figures"):
        (tmp_path / folder).mkdir()
    record = sorted((RESULTS / "records" / "figure2").glob("*.json"))[0]
    (tmp_path / "records" / "mine").mkdir(parents=True)
    (tmp_path / "records" / "mine" / record.name).write_bytes(record.read_bytes())
    (tmp_path / "tables" / "table1.csv").write_text(f"a,records\n1,mine/{record.stem}\n")
    (tmp_path / "tables" / "table1.md").write_text("**Caption**\n\n| a | runs |\n|--:|:--|\n| 1 | [1](x) |\n")
    with pytest.raises(UserError, match=f"mine/{record.name} is the record figure2/{record.stem}: move it"):
        build(tmp_path, tmp_path / "out")


def test_without_tables_one_line_says_how_to_build_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tables in .*: build them with `spectrim-table`"):
        build(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "title"), [("table7_models", "Table 7: models"), ("figure5", "Figure 5"), ("latency", None)]
)
def test_titles(name: str, title: str | None) -> None:
    assert tables.title_of(name) == title
