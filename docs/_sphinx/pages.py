"""Make pages out of the files as they are: the contents, the titles of the tables, and the modules of a folder."""

import pkgutil
import re
from importlib import import_module
from pathlib import Path

from docutils import nodes
from markdown_it import MarkdownIt
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import spectrim
from spectrim.report.site.build import build
from spectrim.report.site.tables import title_of

REDIRECT = (
    '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url={0}"><a href="{0}">spectrim</a>\n'
)
# Raw, because the report is no page of the site: it is written beside them.
REPORT = """~~~{raw} html
<p><a href="../report/index.html">The report</a> has every table to sort and filter, and a page for every run.</p>
~~~"""
MARKDOWN = MarkdownIt("commonmark").enable("table")
RECORDS = re.compile(r"\]\(\.\./records/([^)]+)\.json\)")  # links of a table, which the report answers on the site


def contents(index: str) -> str:
    """Make the contents of the site from the lists of the index page: a caption and links to pages."""
    parts = []
    for caption, links in re.findall(r"^## (.*)\n\n((?:- \[.*\n(?:  .*\n)*)+)", index, re.MULTILINE):
        pages = re.findall(r"^- \[([^\]]+)\]\(([^)]+)\)", links, re.MULTILINE)
        entries = "\n".join(f"{title} <{re.sub(r'[.](md|rst)$', '', path)}>" for title, path in pages)
        parts.append(f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n")
    return "\n".join(parts)


def width_class(text: str) -> str:
    """Return the class of a cell: a short one stays on one line, a long one gets room."""
    return "short" if len(text) <= 26 else "long" if len(text) > 60 else ""


def table_page(markdown: str) -> str:
    """Render the page of a table as HTML: some thousand cells take seconds as a tree of nodes."""
    page = MARKDOWN.render(markdown)
    page = page.replace("<table>", '<div class="table-wrapper"><table class="docutils">')
    page = page.replace("</table>", "</table></div>")
    return re.sub(r"<td([^>]*)>(.*?)</td>", lambda td: f'<td class="{width_class(td[2])}"{td[1]}>{td[2]}</td>', page)


def _widths(app: Sphinx, doctree: nodes.document) -> None:
    for cell in doctree.findall(nodes.entry):
        found = width_class(cell.astext())
        if found:
            cell["classes"].append(found)


def _read(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname == app.config.root_doc:
        source[0] += f"\n{REPORT}\n{contents(source[0])}"
    elif docname.startswith("results/"):
        name = Path(docname).name
        title = title_of(name) or f"Benchmark: {name}"
        figure = Path(app.srcdir, "results", "figures", f"{name}.png")
        shown = f"\n![{title}](../figures/{figure.name})\n" if figure.exists() else ""
        table = table_page(RECORDS.sub(r"](../../report/runs/\1.html)", source[0]))
        source[0] = f"---\norphan: true\n---\n# {title}\n{shown}\n~~~{{raw}} html\n{table}\n~~~\n"


class Package(SphinxDirective):
    """``.. package:: surgery`` documents every module of the folder, a section each.

    What is public as ``spectrim.NAME`` has its entry on a page for users, and only a link here.
    """

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        package = import_module(f"spectrim.{self.arguments[0]}")
        modules = [module.name for module in pkgutil.iter_modules(package.__path__) if not module.ispkg]
        sections = [self.section(f"{self.arguments[0]}.{name}") for name in modules]
        return self.parse_text_to_nodes("\n".join(sections), allow_section_headings=True)

    def section(self, name: str) -> str:
        module = f"spectrim.{name}"
        public = [own for own in spectrim.__all__ if getattr(spectrim, own).__module__ == module]
        lines = [f"``{name}``", "-" * (len(name) + 4), "", f".. automodule:: {module}", "   :members:"]
        if public:
            lines += [f"   :exclude-members: {', '.join(public)}", ""]
            lines += [f"Public: {', '.join(f'``spectrim.{own}``' for own in public)}."]
        return "\n".join([*lines, "", ""])


def _finish(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        target = f"{app.config.root_doc}.html"
        Path(app.outdir, "index.html").write_text(REDIRECT.format(target), encoding="utf-8")
        if app.config.with_report:
            build(Path(app.srcdir, "results"), Path(app.outdir, "report"))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_config_value("with_report", True, "")
    app.connect("source-read", _read)
    app.connect("doctree-read", _widths)
    app.connect("build-finished", _finish)
    app.add_directive("package", Package)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
