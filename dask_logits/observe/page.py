"""One self-contained HTML page: its frame, style and tables. Text is escaped unless it is marked as HTML.

The page needs no network and no script, follows the system's light or dark mode, and prints. The colours of charts are
those of Okabe and Ito, which colour-blind people can tell apart.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path


def asset(name: str) -> str:
    """Return a style or script beside this module."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


STYLE = asset("page.css")


def policy(script: str) -> str:
    """Return the content security policy of a page that runs this script alone and asks its server only."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; connect-src 'self'"


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(value: object) -> Html:
    """Escape a value for HTML, unless it is HTML.

    >>> text("<b>"), text(Html("<b>"))
    ('&lt;b&gt;', '<b>')
    """
    return value if isinstance(value, Html) else Html(escape(str(value)))


def shortened(value: str, most: int = 160) -> Html:
    """Return the beginning of a document's text in its own direction of writing, without line ends."""
    words = " ".join(value.split())
    return Html(f"<bdi>{text(words[:most])}</bdi>{'…' if len(words) > most else ''}")


def badge(state: str) -> Html:
    """Return the state of a run, in the colour of its meaning."""
    bad = " bad" if state in ("failed", "damaged", "stopped") else ""
    return Html(f'<span class="state{bad}">{text(state)}</span>')


def document(title: str, body: str, *, style: str = STYLE, head: str = "", end: str = "") -> str:
    """Return a whole page."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"{head}<title>{text(title)}</title><style>{style}</style></head><body>\n{body}\n{end}</body></html>\n"
    )


def section(name: str, title: str, *parts: object) -> Html:
    """Return a section with its heading. Parts that are not HTML become paragraphs."""
    inner = "\n".join(part if isinstance(part, Html) else f"<p>{text(part)}</p>" for part in parts if part)
    return Html(f'<section id="{name}"><h2>{text(title)}</h2>\n{inner}</section>')


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: Iterable[int] = (), label: str) -> Html:
    """Return a table that scrolls by itself on a narrow screen. Columns of numbers are aligned to the right."""
    right = frozenset(numbers)
    names = "".join(f'<th scope="col"{" class=n" if i in right else ""}>{text(name)}</th>' for i, name in
                    enumerate(head))  # fmt: skip
    lines = "".join(
        "<tr>"
        + "".join(f"<td{' class=n' if i in right else ''}>{text(cell)}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return Html(
        f'<div class="wide" tabindex="0" role="region" aria-label="{text(label)}"><table>'
        f"<thead><tr>{names}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def pairs(rows: Iterable[tuple[object, object]]) -> Html:
    """Return a table of names and values."""
    lines = "".join(f'<tr><th scope="row">{text(name)}</th><td>{text(value)}</td></tr>' for name, value in rows)
    return Html(f"<table><tbody>{lines}</tbody></table>")


def tiles(rows: Iterable[tuple[str, object]]) -> Html:
    """Return the main figures."""
    return Html(
        '<dl class="tiles">' + "".join(f"<div><dt>{text(a)}</dt><dd>{text(b)}</dd></div>" for a, b in rows) + "</dl>"
    )


def folded(title: str, inner: Html) -> Html:
    """Return details that open on request."""
    return Html(f"<details><summary>{text(title)}</summary>{inner}</details>")
