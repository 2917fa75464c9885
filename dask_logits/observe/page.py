"""One self-contained HTML page: its frame, style and tables. Text is escaped unless it is marked as HTML.

The page needs no network and no script, follows the system's light or dark mode, and prints. The colours of charts are
those of Okabe and Ito, which colour-blind people can tell apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

# Four figures in a row or fewer, each wide enough for "10,000 of 10,000".
STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b2430;--soft:#5a6675;--line:#dfe4ea;--wash:#f4f6f8;--accent:#1f66a8;
--bad:#b0400c;--c0:#0072b2;--c1:#e69f00;--c2:#009e73;--c3:#56b4e9;--c4:#d55e00;--c5:#cc79a7;--c6:#b8a800;--c7:#6d7784}
@media(prefers-color-scheme:dark){:root{--paper:#14181d;--ink:#e4e9ef;--soft:#9aa6b4;--line:#2c343e;--wash:#1c2229;
--accent:#77b3ea;--bad:#ff9a66;--c0:#3d9bd6;--c6:#d9cb3f;--c7:#93a0ae}}
@media print{:root{color-scheme:light;--paper:#fff;--ink:#000;--soft:#444;--line:#ccc;--wash:#fff;--accent:#1f66a8;
--bad:#b0400c}nav{display:none}section,tr,figure{break-inside:avoid}body{font-size:11pt}}
*{box-sizing:border-box}
body{margin:0 auto;padding:2.5rem 1.25rem 4rem;max-width:60rem;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.75rem;line-height:1.25;margin:0 0 .25rem;font-weight:650;letter-spacing:-.01em}
h2{font-size:1.2rem;margin:0 0 .5rem;font-weight:650}h3{font-size:1rem;margin:1.5rem 0 .25rem;font-weight:600}
p{margin:.25rem 0 1rem;max-width:44rem}header p,.soft{color:var(--soft)}
section{margin-top:3rem}
a{color:var(--accent)}:focus-visible{outline:2px solid var(--accent);outline-offset:2px;border-radius:3px}
nav{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;margin:1.5rem 0 0;font-size:.9rem}nav a{text-decoration:none}
nav a:hover{text-decoration:underline}
.state{display:inline-block;padding:0 .6rem;border:1px solid currentColor;border-radius:1rem;font-size:.85rem;
color:var(--accent)}.state.bad{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(max(9rem,22%),1fr));gap:1px;margin:1.5rem 0 0;
padding:0;border:1px solid var(--line);border-radius:8px;overflow:hidden}
.tiles div{box-shadow:0 0 0 1px var(--line);padding:.75rem .6rem}.tiles dt{color:var(--soft);font-size:.8rem}
.tiles dd{margin:0;font-size:1rem;white-space:nowrap;font-weight:600;font-variant-numeric:tabular-nums}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--soft);padding-bottom:.25rem}
th,td{text-align:left;vertical-align:top;padding:.4rem 1rem .4rem 0;border-bottom:1px solid var(--line)}
.wide td{overflow-wrap:break-word}
th{font-weight:500;color:var(--soft)}thead th{white-space:nowrap}tbody th{min-width:8rem}
td.n,th.n{text-align:right;white-space:nowrap}.text{min-width:14rem}tr>:last-child{padding-right:0}
code,pre{font:.85rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{background:var(--wash);padding:1rem;border-radius:8px;overflow-x:auto;margin:.5rem 0 1rem}
details{margin:.5rem 0}summary{cursor:pointer;color:var(--accent);font-size:.9rem;width:fit-content}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:1rem 2.5rem}
.chart{display:grid;grid-template-columns:3.2rem 1fr;margin:.75rem 0 1rem;font-size:.75rem;color:var(--soft);
font-variant-numeric:tabular-nums}
.plot svg{display:block;width:100%;height:11rem;overflow:visible}
.y,.x{position:relative}.y span{position:absolute;right:.5rem;transform:translateY(50%);white-space:nowrap}
.x{grid-column:2;height:1.4rem;border-top:1px solid var(--soft)}
.x span{position:absolute;transform:translateX(-50%);padding-top:.15rem;white-space:nowrap}
.top{grid-column:1/3;margin-bottom:.6rem}.unit{grid-column:2;text-align:right}
svg *{vector-effect:non-scaling-stroke}
.grid{stroke:var(--line)}.fill{fill:var(--accent)}.area{fill:var(--accent);fill-opacity:.3;stroke:var(--accent);
stroke-width:1.5}.line{fill:none;stroke:var(--accent);stroke-width:2}
.dot{stroke:var(--accent);stroke-width:8;stroke-linecap:round}
.box{fill:var(--accent);stroke:var(--paper);stroke-width:1}.box:hover{fill-opacity:.7}
.cross path{stroke:var(--bad);stroke-width:2;fill:none}.mild path{stroke:var(--c1)}
.pause{stroke:var(--soft);stroke-dasharray:3 3}
.bar{display:block;width:100%;height:1.75rem;margin:.75rem 0}
.cells{display:block;width:100%;height:auto;margin:.75rem 0}.cells path{stroke-width:8;stroke-dasharray:8 2;
vector-effect:none;fill:none}.legend{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;font-size:.85rem;margin:.5rem 0}
.kind0{stroke:var(--c2);background:var(--c2)}.kind1{stroke:var(--line);background:var(--line)}
.kind2{stroke:var(--accent);background:var(--accent)}.kind3{stroke:var(--c4);background:var(--c4)}
.spark{width:9rem;height:1.6rem;display:block}
.lanes{display:grid;grid-template-columns:minmax(5rem,11rem) 1fr;gap:.3rem .75rem;align-items:center;font-size:.75rem;
color:var(--soft)}.lane{display:block;width:100%;height:1rem;background:var(--wash)}.lanes .x{grid-column:2}
.key{display:inline-block;width:.75rem;height:.75rem;border-radius:2px;margin-right:.5rem;vertical-align:-.05rem}
td:has(.key){white-space:nowrap}
""" + "".join(f".part{i}{{fill:var(--c{i});background:var(--c{i})}}" for i in range(8))  # fmt: skip


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
