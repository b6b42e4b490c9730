"""Settings of the documentation site; `make docs` builds it into build/docs without a network."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

from sphinx.pycode import ModuleAnalyzer

from topk_attention import __version__

project = "topk_attention"
author = "The topk_attention authors"
project_copyright = "The topk_attention authors, Apache License 2.0"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "parameter_tables",
    "directives",
    "phone_pictures",
]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # included tables begin where their own files do

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 60
copybutton_exclude = ".linenos, .gp, .go"


def _analyze_without_overloads(analyzer: ModuleAnalyzer) -> None:
    _analyze(analyzer)
    analyzer.overloads.clear()


# An overloaded function is shown with its own signature, once.
_analyze = ModuleAnalyzer.analyze
ModuleAnalyzer.analyze = _analyze_without_overloads  # type: ignore[method-assign]

html_theme = "furo"
html_title = f"topk_attention {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
