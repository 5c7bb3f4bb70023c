"""Sphinx configuration. ``sphinx-build -W docs build/site`` builds the site without network access."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs/extensions"))

project = "normfused"
author = "The normfused authors"
version = release = (ROOT / "normfused/_version.py").read_text().split('"')[1]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "benchmark_cells",
    "call_section",
    "mathml",  # formulas as MathML, which browsers render themselves
    "repository_pages",  # README files of other folders as pages
]
exclude_patterns = ["extensions"]
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(torch|numpy|np|nn|collections|optional|PIL|matplotlib)\b.*")]

# Markdown, as GitHub renders it, with $formulas$ and links to headings.
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # README files of other folders start at their own level
nb_execution_mode = "off"  # notebooks are committed with their outputs; tests/test_notebooks.py executes them

# Docstrings: Google style, and a section with the arguments of a call.
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Call"]
autodoc_typehints = "none"  # docstrings give dtypes and shapes
autodoc_member_order = "bysource"

html_theme = "furo"
html_title = f"normfused {version}"
html_static_path = ["static"]
html_extra_path = ["llms.txt"]  # the pages for language models, see llmstxt.org
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_copyright = False
highlight_language = "none"  # of blocks that name no language
html_copy_source = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
