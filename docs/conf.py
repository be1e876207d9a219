"""Sphinx: the pages of this folder and the API reference. `make docs` builds it, warnings as errors."""

from __future__ import annotations

import re

from sphinx.application import Sphinx

import polybit

project = "polybit"
release = version = polybit.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 3

default_role = "code"  # docstrings write `x` for code
add_module_names = False
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_typehints_format = "short"
maximum_signature_line_length = 100
napoleon_numpy_docstring = False

html_theme = "alabaster"
html_theme_options = {"description": "Quantized weights for PyTorch on every device", "page_width": "1100px"}
html_show_sourcelink = False


def escape(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings are prose: outside of backticks |x|, a * b and quantize_ are no markup."""
    for i, line in enumerate(lines):
        parts = re.split(r"(:\w+:`[^`]*`|``[^`]*``|`[^`]*`)", line)
        parts[::2] = [re.sub(r"([|*])|(?<=\w)(_)(?!\w)", r"\\\1\2", text) for text in parts[::2]]
        lines[i] = "".join(parts)


def setup(app: Sphinx) -> None:
    """Before napoleon, which adds markup of its own."""
    app.connect("autodoc-process-docstring", escape, priority=100)
