"""Sphinx: `make docs` builds the pages of this folder, and the docstrings that they show, into build/docs."""

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
