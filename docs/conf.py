"""Settings of the documentation site. ``scripts/docs.sh`` builds it."""

from __future__ import annotations

import sys
from pathlib import Path

from dask_logits import __version__

sys.path.insert(0, str(Path(__file__).parent))

project = "dask_logits"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "site_pages"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"dask_logits {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False

myst_enable_extensions = ["colon_fence"]
# Links to headings, with the names that a code host gives them.
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
maximum_signature_line_length = 88
python_display_short_literal_types = True
napoleon_google_docstring = False
napoleon_use_rtype = False

# Every reference to a name of this package must be one of the reference pages. Other packages have pages of their own,
# to which nothing links, because the build needs no network.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!dask_logits\b).*"),
    ("py:.*", r"dask_logits\.(config\.|train\.decode\.Decoder|train\.heads\.Adapter|vocabulary\.).*"),
]
