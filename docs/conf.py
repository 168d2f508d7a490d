"""How the site of the documentation is built: `make docs`, warnings are errors."""

import os
import re

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import bilevel

os.environ["TQDM_DISABLE"] = "1"  # no progress bars in the pages of the examples

project = "bilevel"
author = "the bilevel developers"
version = release = bilevel.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
]
html_theme = "furo"
html_title = "bilevel"
exclude_patterns = ["_build", "gallery/*.ipynb", "gallery/*.py", "gallery/*.json"]

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3  # [links](page.md#to-a-heading)

html_math_renderer = "mathml"
default_role = "literal"  # `names` in docstrings
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures show them already
napoleon_google_docstring = True
napoleon_numpy_docstring = False

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",  # run them all
    "abort_on_example_error": True,
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_memory": False,
    "min_reported_time": 1,
    "parallel": 2,
}


def escape_bars(app, what, name, obj, options, lines):
    """Keep |x| in docstrings from being read as a substitution; `code` and examples stay as they are."""
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            pieces = re.split(r"(`[^`]*`)", line)
            lines[i] = "".join(piece if piece.startswith("`") else piece.replace("|", r"\|") for piece in pieces)


def inline_math(self, node):
    """Write $formula$ as MathML, which browsers draw without a script from elsewhere."""
    self.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def block_math(self, node):
    """The same for $$formula$$."""
    self.body.append(f'<div class="formula">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app):
    """Bars before napoleon, whose priority is 500."""
    app.add_html_math_renderer("mathml", inline_renderers=(inline_math, None), block_renderers=(block_math, None))
    app.connect("autodoc-process-docstring", escape_bars, priority=400)
