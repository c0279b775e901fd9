"""The pages: their links lead somewhere, their code compiles, their names exist, and the README stays short."""

import re
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY", "NOTICE")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
EXPECTED = (
    "getting_started own_network algorithms experiments results language_models large_models clusters tracking "
    "searches architecture"
)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
# Files that are named after the package, and the examples of the page on extensions.
NO_NAMES = re.compile(r"spectrim\.(json|safetensors|plugins)$|\.mine(\.|$)")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """The anchors of the headings, as GitHub forms them."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in BLOCK.findall(text_of(page)) if kind == language]


def names(page: Path) -> Iterator[str]:
    """Dotted names in code: in backticks, in Python and in yaml."""
    text = text_of(page)
    code = [*re.findall(r"`([^`\n]+)`", BLOCK.sub("", text)), *blocks(page, "python"), *blocks(page, "yaml")]
    for part in code:
        yield from re.findall(r"(?<![\w./-])spectrim(?:\.[A-Za-z_]\w*)+", part)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 8192


def sentences(page: Path) -> Iterator[str]:
    """The sentences of a page, without its tables, its code and its copies of results."""
    text = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "\n\n", BLOCK.sub("\n\n", text_of(page)), flags=re.DOTALL)
    text = re.sub(r"\$\$.*?\$\$|\$[^$]*\$|`[^`]*`", "F", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->|\]\([^)]*\)|^[|#].*$", "", text, flags=re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n|\n(?=[-*] |\d+\. )", text):
        yield from re.split(r"(?<=[.?!])\**\s+(?=[A-Z*F\d\[])", paragraph)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_a_sentence_has_at_most_25_words(page: Path) -> None:
    assert [one for one in sentences(page) if len(re.findall(r"[^\W\d][\w'’-]*", one)) > 25] == []


def test_a_long_sentence_is_found(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("A short one. Long " + "word " * 25 + "end.\n\n```\n" + "code " * 30 + "\n```\n")
    assert [len(one.split()) for one in sentences(tmp_path / "page.md")][:2] == [3, 27]


def test_every_page_is_linked_from_the_index() -> None:
    linked = set(LINK.findall(text_of(ROOT / "docs" / "index.md")))
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages >= {f"{name}.md" for name in EXPECTED.split()}
    assert pages <= linked


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    broken = []
    for link in LINK.findall(BLOCK.sub("", text_of(page))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page if not path else (page.parent / path).resolve()
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_python_block_compiles(page: Path) -> None:
    for code in blocks(page, "python"):
        compile(code, str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_name_of_the_package_exists(page: Path) -> None:
    for name in names(page):
        if not NO_NAMES.search(name):
            assert resolve_name(name) is not None
    for module in re.findall(r"^(?:from|import) (spectrim[\w.]*)", "\n".join(blocks(page, "python")), re.MULTILINE):
        assert resolve_name(module) is not None


def test_the_names_are_found() -> None:
    found = {name for page in PAGES for name in names(page)}
    assert {"spectrim.compress", "spectrim.load", "spectrim.Joint", "spectrim.Tucker2"} <= found


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_path_of_the_repository_exists(page: Path) -> None:
    text = BLOCK.sub("", text_of(page))
    paths = re.findall(r"`((?:src|conf|experiments|docs|results|tests|notebooks|benchmarks)/[\w./]+)`", text)
    assert [path for path in paths if not re.search("NAME|EXPERIMENT", path) and not (ROOT / path).exists()] == []


def test_every_module_that_the_architecture_names_exists() -> None:
    paths = re.findall(r"`((?:\w+/)+\w+\.py)`", text_of(ROOT / "docs" / "architecture.md"))
    assert len(paths) > 5
    assert [path for path in paths if not (ROOT / "src" / "spectrim" / path).is_file()] == []


def test_every_name_that_the_architecture_puts_into_a_module_is_defined_there() -> None:
    named = re.findall(r"`(\w+)` in `((?:\w+/)+\w+\.py)`", text_of(ROOT / "docs" / "architecture.md"))
    assert len(named) > 3
    for name, path in named:
        source = (ROOT / "src" / "spectrim" / path).read_text(encoding="utf-8")
        assert re.search(rf"^(def|class) {name}\b", source, re.MULTILINE), (name, path)


def test_every_algorithm_of_another_paper_is_in_the_module_of_its_yaml() -> None:
    rows = dict(re.findall(r"^\| `([A-Z]\w+)` \| `(\w+)` \|", text_of(ROOT / "docs" / "algorithms.md"), re.MULTILINE))
    for name, module in rows.items():
        assert resolve_name(f"spectrim.algorithms.related.{module}.{name}") is not None
        assert (ROOT / "conf" / "algorithm" / f"{module}.yaml").is_file()
    modules = {path.stem for path in (ROOT / "src" / "spectrim" / "algorithms" / "related").glob("*.py")}
    configured = {path.stem for path in (ROOT / "conf" / "algorithm").glob("*.yaml")}
    assert set(rows.values()) == modules & configured
