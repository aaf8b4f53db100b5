"""Sphinx configuration: MyST Markdown, API from docstrings, everything offline."""

from docutils import nodes
from docutils.utils.math import latex2mathml

import lcnn_compile

project = "lcnn_compile"
author = "The lcnn_compile authors"
copyright = author
release = version = lcnn_compile.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
nitpicky = True
# References to our own names must resolve. Types of other packages have no page here: the build works without a network.
nitpick_ignore_regex = [("py:.*", r"(?!lcnn_compile\b).*")]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"show-inheritance": False}
python_maximum_signature_line_length = 90
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"lcnn_compile {release}"
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}
html_math_renderer = "mathml"
copybutton_exclude = ".linenos, .gp, .go"


def _mathml(as_block):
    def visit(translator, node):
        translator.body.append(latex2mathml.tex2mathml(node.astext(), as_block=as_block))
        raise nodes.SkipNode

    return visit


def setup(app):
    # Browsers render MathML by themselves; MathJax would be fetched from a network.
    app.add_html_math_renderer("mathml", (_mathml(False), None), (_mathml(True), None))
