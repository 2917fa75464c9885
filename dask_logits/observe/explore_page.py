"""The page of the explorer: one HTML file, with its documents inside or asked for from the server.

All text reaches the page through ``textContent``, never as HTML. A content security policy admits this script alone.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from dask_logits.observe.page import STYLE, asset, document, text

_STYLE = asset("explore.css")

_SCRIPT = asset("explore.js")

_HASH = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
POLICY = (
    f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{_HASH}'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


def explore_page(about: dict[str, Any], documents: Sequence[dict[str, Any]] | None = None) -> str:
    """Return the page.

    Parameters
    ----------
    about
        Sizes and names of the cache.
    documents
        The documents of a self-contained page. None: the page asks its server.
    """
    noun = about["noun"]
    legend = "".join(
        f'<span class="s{i}">{words}</span>'
        for i, words in enumerate(("below 0.5", "0.5 to 1.5", "1.5 to 3", "3 to 5", "5 to 8", "above 8"))
    )
    learned = " Underlined tokens are those that a student learns." if about["masked"] else ""
    ids = "" if about["decoded"] else " The teacher's tokenizer is not on this machine, so token ids are shown."
    # No "<" in the data, so that no text of a document can end the script element.
    data = json.dumps({"about": about, "documents": documents}).replace("<", "\\u003c")
    policy = POLICY.rpartition(";")[0]
    body = f"""<header><h1>What the teacher expected</h1>
<p>{text(about["teacher"])} · {text(about["path"])} · {about["items"]:,} {noun}s, {about["tokens"]:,} tokens</p>
</header><main><p>Each token is coloured by the teacher's surprise: −log of the probability that it gave to this token.
Point at a token, or move with the arrow keys, to see what the teacher expected in its place.{learned}{ids}</p>
<p class="legend" aria-label="Surprise in nats">surprise in nats: {legend}</p>
<div class="tools"><form id="go"><label for="number">{noun}</label>
<input id="number" type="number" min="0" max="{about["items"] - 1}" value="0"><button>Show</button>
<button type="button" id="previous">Previous</button><button type="button" id="next">Next</button></form>
<div class="row" id="finder"><form id="find"><label for="query">Find</label>
<input id="query" placeholder="text, or #42 for an id"><button>Search</button></form>
<button type="button" id="ranked">Most surprising</button></div></div>
<p id="message" role="alert"></p><div id="list"></div>
<div class="row"><strong id="place" aria-live="polite"></strong>
<button type="button" id="earlier">Earlier tokens</button>
<button type="button" id="later">Later tokens</button></div>
<div class="view"><div id="tokens" role="listbox" aria-label="Tokens"></div>
<aside id="panel" aria-live="polite" aria-label="What the teacher expected"></aside></div></main>
<script type="application/json" id="data">{data}</script>"""
    head = f'<meta http-equiv="Content-Security-Policy" content="{text(policy)}">'
    return document(f"{noun.capitalize()}s of a cache", body, style=STYLE + _STYLE, head=head,
                    end=f"<script>{_SCRIPT}</script>")  # fmt: skip
