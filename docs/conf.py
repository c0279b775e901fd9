"""Settings of the site: ``make docs`` builds it from the Markdown pages, the tables and the docstrings."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "docs" / "_sphinx"), str(ROOT / "src")]

import spectrim  # noqa: E402 - from this checkout

project = "spectrim"
author = copyright = "The spectrim authors"
version = release = spectrim.__version__

# The root of the repository is the source, so that a relative link means the same on the site and in the repository.
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "NOTICE.md",
    "CHANGELOG.md",
    "docs/**",
    "results/*/*.md",
]
exclude_patterns = [".*", "build", "dist", "src", "tests", "results/records"]

# The extensions of this repository lie in docs/_sphinx.
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "myst_parser",
    "docstrings",
    "mathml",
    "pages",
    "links",
]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
html_math_renderer = "mathml"

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
maximum_signature_line_length = 80
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

nitpicky = True
nitpick_ignore_regex = [
    # Types of other packages: their inventories lie on the network.
    (r"py:.*", r"(?!spectrim\.)\w+\..*"),
    # Type variables have no page.
    (r"py:class", r"(spectrim\..*\.)?[A-Z]"),
]

html_theme = "furo"
pygments_dark_style = "monokai"
html_title = f"spectrim {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
copybutton_exclude = ".linenos, .gp, .go"
