"""Link the names of the package wherever a page or a docstring has them in code, and source files to their pages."""

import re
from collections import defaultdict

from docutils import nodes
from sphinx.addnodes import desc_signature
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode

import spectrim

NAME = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*")


def _short_names(app: Sphinx) -> dict[str, set[str]]:
    """Map the last parts of every documented name to the full names that end so."""
    found: dict[str, set[str]] = defaultdict(set)
    for full, entry in app.env.domains.python_domain.objects.items():
        if not entry.aliased:
            parts = full.split(".")
            for start in range(1, len(parts)):
                found[".".join(parts[start:])].add(full)
    return found


def _target(app: Sphinx, text: str, short: dict[str, set[str]]) -> str | None:
    """Return the full name that ``text`` means, if it means one: a name of the package, a class, or a dotted name."""
    text = text.removesuffix("()")
    if not NAME.fullmatch(text):
        return None
    if text.startswith("spectrim."):
        return text if text in app.env.domains.python_domain.objects else None
    if "." not in text and not re.match("[A-Z]..", text):
        return None
    public = {full for full in short[text] if full.count(".") == 1}
    candidates = public or short[text]
    return next(iter(candidates)) if len(candidates) == 1 else None


def _link(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    short = _short_names(app)
    for literal in list(doctree.findall(nodes.literal)):
        if isinstance(literal.parent, nodes.reference | nodes.title):
            continue
        full = _target(app, literal.astext(), short)
        if full:
            entry = app.env.domains.python_domain.objects[full]
            literal.replace_self(
                make_refnode(app.builder, docname, entry.docname, entry.node_id, literal.deepcopy(), full)
            )


def _own_names(app: Sphinx, doctree: nodes.document) -> None:
    """Let a public entry be found by the name that it has in its module too, as its source page does."""
    for signature in doctree.findall(desc_signature):
        for name in list(signature["ids"]):
            package, _, rest = name.partition(".")
            public = rest.partition(".")[0]
            if package == "spectrim" and public in spectrim.__all__:
                signature["ids"].append(f"{getattr(spectrim, public).__module__}.{rest}")


def _source_pages(app: Sphinx) -> list[tuple[str, dict, str]]:
    """Lead from a source page back by the names in the module, and not by whichever entry was read first."""
    modules = getattr(app.env, "_viewcode_modules", {})
    for module, (code, tags, used, _) in [found for found in modules.items() if found[1]]:
        modules[module] = (code, tags, used, module)
    return []


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("doctree-resolved", _link)
    app.connect("doctree-read", _own_names)
    app.connect("html-collect-pages", _source_pages, priority=100)  # before viewcode
    return {"parallel_read_safe": True, "parallel_write_safe": True}
