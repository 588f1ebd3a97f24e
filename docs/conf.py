"""Sphinx: `make docs` builds the pages of this folder, and the docstrings that they show, into build/docs."""

import re

import otkd_fast

project = "otkd_fast"
author = "The otkd_fast authors"
copyright = author
version = release = otkd_fast.__version__.partition("+")[0]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4

default_role = "code"  # single backticks in docstrings are code
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"otkd_fast {release}"
html_theme_options = {"navigation_with_keys": True}
exclude_patterns = ["_build"]

_CODE = re.compile(r"(``.+?``|`[^`]+`)")
_MARKUP = re.compile(r"(?<![\\\w*])\*(?=\w)|\|")


def escape_mathematics(app, what, name, obj, options, lines) -> None:
    """Docstrings write |x| and (N, C, *positions) as they are read; reStructuredText would take them for markup."""
    literal = None  # indentation of the paragraph that a literal block belongs to
    for k, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if literal is not None and line.strip() and indent <= literal:
            literal = None
        if literal is None and not line.lstrip().startswith((">>>", "...")):
            parts = _CODE.split(line)
            parts[::2] = [_MARKUP.sub(lambda found: "\\" + found[0], part) for part in parts[::2]]
            lines[k] = "".join(parts)
            if line.rstrip().endswith("::"):
                literal = indent


def setup(app) -> None:
    app.connect("autodoc-process-docstring", escape_mathematics, priority=400)  # before napoleon
