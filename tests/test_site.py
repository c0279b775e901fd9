"""The site: it builds without a warning, its links lead somewhere, and it reads without the network."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

import spectrim

ROOT = Path(__file__).resolve().parents[1]
REMOTE = ("http:", "https:", "//")


class Page(HTMLParser):
    """The anchors of a page, the links on it, and what a browser loads to show it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.tags: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        self.tags.add(tag)
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag in {"link", "script", "img", "source", "iframe"}:
            self.loaded += [given[name] for name in ("href", "src") if name in given]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as ``make docs`` builds it."""
    folder = tmp_path_factory.mktemp("site")
    options = ["-q", "-W", "--keep-going", "-j", "2", "-c", "docs", "-d", str(folder / "doctrees")]
    options += ["-D", "with_report=0"]  # it has tests of its own
    command = [sys.executable, "-m", "sphinx", *options, ".", str(folder / "html")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "html"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def test_every_link_inside_leads_to_a_file_and_an_anchor(site: Path, pages: dict[Path, Page]) -> None:
    broken = []
    count = 0
    for path, page in pages.items():
        for link in (*page.links, *page.loaded):
            if link.startswith((*REMOTE, "mailto:", "data:")):
                continue
            target, anchor = urldefrag(link)
            file = Path(os.path.normpath(path.parent / unquote(target.partition("?")[0]))) if target else path
            count += 1
            if file.is_relative_to(site / "report"):
                name = file.relative_to(site / "report").with_suffix("").as_posix()
                known = name == "index" or (ROOT / "results" / f"{name.replace('runs/', 'records/')}.json").is_file()
                broken += [] if known else [f"{path.relative_to(site)}: {link}"]
                continue
            if not file.is_file() or (anchor and file.suffix == ".html" and unquote(anchor) not in pages[file].anchors):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []
    assert count > 1000


def test_it_reads_without_the_network(site: Path, pages: dict[Path, Page]) -> None:
    remote = [(path.name, link) for path, page in pages.items() for link in page.loaded if link.startswith(REMOTE)]
    assert remote == []
    styles = [sheet for sheet in site.rglob("*.css") if "url(http" in sheet.read_text(encoding="utf-8")]
    assert styles == []


def test_formulas_are_mathml(site: Path, pages: dict[Path, Page]) -> None:
    glossary = site / "docs" / "glossary.html"
    assert "math" in pages[glossary].tags
    assert "$" not in glossary.read_text(encoding="utf-8").partition("<article")[2].partition("</article")[0]


def test_every_public_name_has_its_entry(site: Path, pages: dict[Path, Page]) -> None:
    anchors = {anchor for path in (site / "docs" / "api").glob("*.html") for anchor in pages[path].anchors}
    assert {f"spectrim.{name}" for name in spectrim.__all__} <= anchors


def test_every_module_has_its_section(site: Path, pages: dict[Path, Page]) -> None:
    anchors = {anchor for path in (site / "docs" / "api").rglob("*.html") for anchor in pages[path].anchors}
    source = ROOT / "src" / "spectrim"
    modules = {".".join(path.relative_to(source.parent).with_suffix("").parts) for path in source.rglob("*.py")}
    private = {"spectrim.api", "spectrim.__main__"}  # public under shorter names; a command
    missing = {name for name in modules if not name.endswith("__init__")} - private
    assert {name for name in missing if f"module-{name}" not in anchors} == set()


def test_a_name_in_code_is_a_link_to_its_entry(site: Path, pages: dict[Path, Page]) -> None:
    links = pages[site / "docs" / "algorithms.html"].links
    assert {"api/algorithms.html#spectrim.Joint", "api/decomposers.html#spectrim.Tucker2"} <= set(links)


def test_the_arguments_of_a_docstring_are_a_list(site: Path) -> None:
    text = (site / "docs" / "api" / "compress.html").read_text(encoding="utf-8")
    terms = re.findall(r"<dt><code[^>]*><span class=\"pre\">(\w+)</span></code></dt>", text)
    assert terms[:7] == ["calibration", "verification", "train", "loss", "params_kept", "algorithm", "decomposer"]
