"""The page of the explorer: one HTML file, with its documents inside or asked for from the server.

All text reaches the page through ``textContent``, never as HTML. A content security policy admits this script alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from string import Template
from typing import Any

from dask_logits.observe.page import STYLE, asset, document, policy, text

_BODY = Template(asset("explore.html"))
_STYLE = STYLE + asset("explore.css")
_SCRIPT = asset("explore.js")
# In the page itself, and in the answers of the server.
_PAGE_POLICY = f"{policy(_SCRIPT)}; base-uri 'none'; form-action 'none'"
POLICY = f"{_PAGE_POLICY}; frame-ancestors 'none'"


def explore_page(about: dict[str, Any], documents: Sequence[dict[str, Any]] | None = None) -> str:
    """Return the page.

    Parameters
    ----------
    about
        Sizes and names of the cache.
    documents
        The documents of a self-contained page. None: the page asks its server.
    """
    body = _BODY.substitute(
        teacher=text(about["teacher"]),
        path=text(about["path"]),
        items=f"{about['items']:,}",
        last=about["items"] - 1,
        tokens=f"{about['tokens']:,}",
        noun=about["noun"],
        learned=" Underlined tokens are those that a student learns." if about["masked"] else "",
        ids="" if about["decoded"] else " The teacher's tokenizer is not on this machine, so token ids are shown.",
        # No "<" in the data, so that no text of a document can end the script element.
        data=json.dumps({"about": about, "documents": documents}).replace("<", "\\u003c"),
    )
    head = f'<meta http-equiv="Content-Security-Policy" content="{text(_PAGE_POLICY)}">'
    title = f"{about['noun'].capitalize()}s of a cache"
    return document(title, body, style=_STYLE, head=head, end=f"<script>{_SCRIPT}</script>")
