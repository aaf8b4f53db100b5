"""Sphinx configuration: MyST Markdown, API from docstrings, everything offline."""

import re

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.util.nodes import make_refnode

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
# Bases and settings that users never write have none either.
_INNER = r"lcnn_compile\.modules\.(calls\.Settings|tabled\.HasTables)"
nitpick_ignore_regex = [("py:.*", r"(?!lcnn_compile\b).*"), ("py:class", _INNER)]

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


def _plain_marks(app, what, name, obj, options, lines):
    """Docstrings are plain text: a shape [*, m] or a norm |x| starts no emphasis and no substitution."""
    for i, line in enumerate(lines):
        bullet = re.match(r"\s*[*|] ", line)
        start = bullet.end() if bullet else 0
        parts = re.split(r"(``.+?``)", line[start:])
        parts[::2] = [re.sub(r"([*|])", r"\\\1", part) for part in parts[::2]]
        lines[i] = line[:start] + "".join(parts)


def _by_last_name(app, env, node, contnode):
    """A reference by the module in which something is defined, where the API lists it under its package."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not target.startswith("lcnn_compile."):
        return None
    domain = env.get_domain("py")
    last = target.rpartition(".")[2]
    places = {(e.docname, e.node_id) for name, e in domain.objects.items() if name.rpartition(".")[2] == last}
    if len(places) != 1:
        return None
    docname, anchor = places.pop()
    return make_refnode(app.builder, node["refdoc"], docname, anchor, contnode, target)


def setup(app):
    app.connect("autodoc-process-docstring", _plain_marks, priority=100)
    app.connect("missing-reference", _by_last_name)
    # Browsers render MathML by themselves; MathJax would be fetched from a network.
    app.add_html_math_renderer("mathml", (_mathml(False), None), (_mathml(True), None))
