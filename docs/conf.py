"""Sphinx: `make docs` builds the pages of this folder, and the docstrings that they show, into build/docs."""

import re

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList

import otkd_fast
from otkd_fast import _dispatch

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


# what is known of each backend's kernels, wherever it has some
STATES = {
    "cpu": "yes: C++, SSE2, AVX2 or AVX-512 chosen at run time",
    "cuda": "yes: CUDA C++, compiled for 80 to 120 and executed on the host by the tests; not yet run on a GPU",
    "triton": "yes: interpreted by the tests and compiled ahead of time for 80 to 120; not yet run on a GPU",
}


class Backends(Directive):
    """``{backends} op ...``: which backends have kernels of these ops, from the package's own table."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list:
        ops = [] if self.arguments[0] == "none" else self.arguments[0].split()
        unknown = set(ops) - set(_dispatch.OPS)
        if unknown:
            raise self.error(f"backends: expected ops of {', '.join(_dispatch.OPS)}, got {', '.join(unknown)}")
        names = ops if len(ops) > 1 else [""]
        lines = ["| backend | " + " | ".join(f"`{op}`" if op else "kernels" for op in names) + " |"]
        lines += [
            "|---" * (len(names) + 1) + "|",
            "| reference | " + " | ".join(["PyTorch, on every device"] * len(names)) + " |",
        ]
        for backend, state in STATES.items():
            cells = [state if op in _dispatch.KERNELS[backend] else "no" for op in ops or [""]]
            lines.append(f"| {backend} | {' | '.join(cells)} |")
        lines += [
            "",
            "Where a device has no kernel the reference runs; `otkd_fast.explain(...)` says what runs, and why.",
        ]
        section = nodes.container()
        self.state.nested_parse(StringList(lines, "backends"), self.content_offset, section)
        return section.children


def setup(app) -> None:
    app.add_directive("backends", Backends)
    app.connect("autodoc-process-docstring", escape_mathematics, priority=400)  # before napoleon
