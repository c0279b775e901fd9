"""The report in a real browser: sorting, filtering and opening the runs of a row, on a desktop and on a phone."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"needs a browser: one of {', '.join(BROWSERS)}")

# Drives the page as a person does, and leaves what it saw in the document.
DRIVER = """
window.addEventListener("load", () => {
  const table = document.querySelector("table.sortable"), body = table.tBodies[0];
  const column = (at) => [...body.rows].map((row) => row.cells[at].textContent.trim());
  const heads = [...table.tHead.rows[0].cells], seen = { errors: window.errors };
  seen.before = column(3);
  heads[3].querySelector("button").click();
  seen.ascending = column(3);
  heads[3].querySelector("button").click();
  seen.descending = column(3);
  seen.sorted = heads.map((head) => head.getAttribute("aria-sort"));
  const row = body.rows[1];
  row.cells[2].click();
  const opened = row.nextElementSibling;
  seen.opened = [...opened.querySelectorAll("a")].map((link) => [link.textContent, link.getAttribute("href")]);
  seen.own = [...row.querySelectorAll(".runs a")].map((link) => link.getAttribute("href"));
  row.cells[2].click();
  seen.closed = body.querySelectorAll(".opened").length;
  const input = document.querySelector(".filter input");
  input.value = "6 0.01";
  input.dispatchEvent(new Event("input"));
  seen.filtered = [...body.rows].filter((one) => !one.hidden).map((one) => one.cells[0].textContent);
  seen.count = document.querySelector(".count").textContent;
  seen.wide = document.documentElement.scrollWidth - window.innerWidth;
  const pre = document.createElement("pre");
  pre.id = "seen";
  pre.textContent = JSON.stringify(seen);
  document.body.append(pre);
});
"""
WATCH = "window.errors = []; window.addEventListener('error', (event) => window.errors.push(event.message));"


def open_page(page: Path, width: int, folder: Path) -> str:
    """Return the document of a page after its scripts have run."""
    given = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}", f"--window-size={width},800"]
    command = [str(BROWSER), *given, "--virtual-time-budget=5000", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture(scope="module", params=[1200, 390], ids=["desktop", "phone"])
def seen(request: pytest.FixtureRequest, report: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    text = (report / "tables" / "table8_selection.html").read_text(encoding="utf-8")
    page = report / "tables" / f"driven{request.param}.html"
    head, script, rest = text.partition('<script src="../report.js" defer></script>')
    assert script
    page.write_text(f"{head}<script>{WATCH}</script>{script}<script>{DRIVER}</script>{rest}", encoding="utf-8")
    dumped = open_page(page, request.param, tmp_path_factory.mktemp("browser"))
    page.unlink()
    found = re.search(r'<pre id="seen">(.*?)</pre>', dumped, re.DOTALL)
    assert found, dumped[-2000:]
    return dict(json.loads(unescape(found[1])))


def test_no_script_fails(seen: dict) -> None:
    assert seen["errors"] == []


def test_a_heading_sorts_by_number_both_ways(seen: dict) -> None:
    numbers = [float(cell.split()[0]) for cell in seen["before"]]
    assert [float(cell.split()[0]) for cell in seen["ascending"]] == sorted(numbers) != numbers
    assert [float(cell.split()[0]) for cell in seen["descending"]] == sorted(numbers, reverse=True)
    assert [order for order in seen["sorted"] if order] == ["descending"]


def test_a_cell_opens_its_runs_and_closes_them(seen: dict) -> None:
    assert len(seen["own"]) == 6 and [link for _, link in seen["opened"]] == seen["own"]
    assert all(link == f"../runs/{name}.html" for name, link in seen["opened"])
    assert seen["closed"] == 0


def test_the_filter_leaves_rows_that_hold_every_word(seen: dict) -> None:
    assert "6" in seen["filtered"] and 0 < len(seen["filtered"]) < len(seen["before"])
    assert seen["count"] == f"{len(seen['filtered'])} of {len(seen['before'])} rows."


def test_the_page_is_no_wider_than_the_window(seen: dict) -> None:
    assert seen["wide"] <= 0
