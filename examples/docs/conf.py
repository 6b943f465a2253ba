"""Sphinx's settings: ``make docs`` writes the site to build/docs."""

import latex2mathml.converter
from docutils import nodes

import lean_fx

project = "lean_fx"
version = release = lean_fx.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

# The sources are those of examples/, so that pages can link to the results beside them.
root_doc = "docs/index"
include_patterns = ["docs/**", "results/**"]

html_title = "lean_fx"
html_show_copyright = False
html_theme = "furo"
html_copy_source = False
html_extra_path = ["redirect"]
html_static_path = ["static"]
html_css_files = ["wide.css"]
html_math_renderer = "mathml"

myst_enable_extensions = ["dollarmath"]
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature would not fit a screen; Args tells what is taken
napoleon_use_rtype = False
napoleon_custom_sections = [("Shape", "notes_style")]
suppress_warnings = ["toc.no_title"]
nitpicky = True  # a reference to what is nowhere is an error of `make docs`, but for these:
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|collections|lightning|optuna)\..*"),
    # Modules that only a reader of the code meets; the code has their docstrings.
    (r"py:.*", r"lean_fx\.(capture|export|graph|kernel|layers|measure|planning|selection)\b.*"),
    (r"py:.*", r"lean_fx\.(reduction|transform|errors|skip_reason)\..*"),
    (r"py:exc", r"TrialError"),
]


def _formula(display):
    """Write a formula as MathML, which a browser draws without a script or the network."""

    def visit(translator, node):
        made = latex2mathml.converter.convert(node.astext(), display=display)
        translator.body.append(f"<p>{made}</p>" if display == "block" else made)
        raise nodes.SkipNode

    return visit, None


def setup(app):
    """Add the renderer of formulas."""
    app.add_html_math_renderer("mathml", _formula("inline"), _formula("block"))
