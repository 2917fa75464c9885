"""The page of the explorer: one HTML file, with its documents inside or asked for from the server.

All text reaches the page through ``textContent``, never as HTML. A content security policy admits this script alone.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from dask_logits.observe.page import STYLE, document, text

_STYLE = """
body{max-width:76rem}header{margin-bottom:1.5rem}header p{max-width:none}
form,.row{display:flex;flex-wrap:wrap;gap:.5rem;align-items:center}
input,button{font:inherit;padding:.35rem .7rem;border:1px solid var(--line);border-radius:6px;background:var(--paper);
color:var(--ink)}button{cursor:pointer;color:var(--accent)}button:hover{background:var(--wash)}
button:disabled{color:var(--soft);cursor:default}#number{width:8rem}#query{width:14rem}
.tools{display:flex;flex-wrap:wrap;gap:.75rem 2rem;margin:1rem 0}
.view{display:grid;grid-template-columns:minmax(0,1fr) 21rem;gap:2rem;align-items:start;margin-top:1.5rem}
#tokens{white-space:pre-wrap;line-height:2;font-size:1.02rem}
#tokens span{padding:.15em 0;border-radius:2px;cursor:pointer}
#tokens span:hover,#tokens span:focus{outline:2px solid var(--accent);outline-offset:1px}
.s1{background:rgb(213 94 0/.1)}.s2{background:rgb(213 94 0/.2)}.s3{background:rgb(213 94 0/.32)}
.s4{background:rgb(213 94 0/.46)}.s5{background:rgb(213 94 0/.62)}
.learned{border-bottom:2px solid var(--accent)}
.legend span{display:inline-block;padding:.1rem .5rem;border-radius:3px;font-size:.8rem}
aside{position:sticky;top:1rem;border:1px solid var(--line);border-radius:8px;padding:1rem;max-height:92vh;
overflow:auto;background:var(--paper)}aside h2{font-size:1rem;white-space:pre-wrap}
aside td,aside th{padding:.2rem .6rem .2rem 0}
aside code{white-space:pre-wrap}.true td{font-weight:650}
.share{display:block;height:.5rem;margin-top:.45rem;background:var(--accent);border-radius:2px}
#list{max-height:20rem;overflow:auto;margin-bottom:1rem}ol{padding-left:2rem}
li{margin:.3rem 0}#message{color:var(--bad)}
@media(max-width:50rem){.view{display:block}aside{position:sticky;top:auto;bottom:0;margin-top:1rem;max-height:40vh}}
"""

_SCRIPT = r"""
"use strict";
const {about, documents} = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const LIMITS = [0.5, 1.5, 3, 5, 8];
let shown = null;

function make(parent, tag, content = "", name = "") {
  const element = document.createElement(tag);
  element.textContent = content;
  if (name) element.className = name;
  parent.append(element);
  return element;
}

function visible(piece) {
  return piece.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ | $/g, "␣") || "(part of a character)";
}

const percent = (p) => (p > 0 && p < 0.0001 ? "< 0.01 %" : (100 * p).toFixed(2) + " %");
const nats = (value) => (value >= 1e9 ? "infinite" : value.toFixed(2) + " nats");
const grouped = (count) => count.toLocaleString("en");

async function ask(path, query) {
  const answer = await fetch(path + "?" + new URLSearchParams(query));
  const value = await answer.json();
  if (!answer.ok) throw new Error(value.error);
  return value;
}

async function guarded(work) {
  at("message").textContent = "";
  try {
    await work();
  } catch (error) {
    at("message").textContent = error.message;
  }
}

async function show(number, position) {
  const first = Math.max(0, position - (position % 512));
  const found = documents ? documents.find((each) => each.number === number) : await ask("document", {number, first});
  if (!found) throw new Error("This file does not contain " + about.noun + " " + number + ".");
  shown = found;
  at("number").value = number;
  const last = found.first + found.ids.length;
  at("place").textContent = about.noun + " " + grouped(number) + ", dataset row " + grouped(found.row) +
    (found.offset ? " from token " + grouped(found.offset) : "") + ", tokens " +
    (found.ids.length ? grouped(found.first) + " to " + grouped(last - 1) : "none") + " of " + grouped(found.n_tokens);
  at("previous").disabled = neighbour(-1) === undefined;
  at("next").disabled = neighbour(1) === undefined;
  at("earlier").disabled = found.first === 0;
  at("later").disabled = Boolean(documents) || last >= found.n_tokens;
  const box = at("tokens");
  box.replaceChildren();
  found.texts.forEach((piece, i) => {
    const surprise = found.surprise[i];
    const level = surprise === null ? 0 : LIMITS.filter((limit) => surprise >= limit).length;
    const token = make(box, "span", piece === "" ? "▫" : piece.replace(/\n/g, "↵\n"), "s" + level);
    if (found.learned && found.learned[i]) token.classList.add("learned");
    token.tabIndex = i ? -1 : 0;
    token.setAttribute("role", "option");
    token.setAttribute("aria-selected", "false");
    token.addEventListener("mouseenter", () => explain(i));
    token.addEventListener("focus", () => explain(i));
  });
  explain(Math.min(Math.max(position - found.first, found.first ? 0 : 1), found.ids.length - 1));
  if (position > 0) focus(position - found.first);
}

function explain(i) {
  const panel = at("panel");
  panel.replaceChildren();
  if (i < 0) return;
  for (const each of at("tokens").querySelectorAll("[aria-selected=true]")) each.setAttribute("aria-selected", "false");
  at("tokens").children[i].setAttribute("aria-selected", "true");
  make(panel, "h2", visible(shown.texts[i]));
  make(panel, "p", "token " + grouped(shown.first + i) + ", id " + shown.ids[i], "soft");
  if (shown.learned)
    make(panel, "p", "A student " + (shown.learned[i] ? "learns" : "does not learn") + " this token.", "soft");
  const best = shown.best[i];
  if (!best) {
    make(panel, "p", shown.first + i === 0 ? "The teacher was not asked for this token: nothing comes before it."
      : "The cache has no targets for this token.");
    return;
  }
  const surprise = shown.surprise[i];
  if (surprise !== null)
    make(panel, "p", "Surprise " + nats(surprise) + ": the teacher gave it " + percent(Math.exp(-surprise)) + ".");
  const table = make(panel, "table");
  const row = (name, p, isTrue) => {
    const line = make(table, "tr", "", isTrue ? "true" : "");
    make(make(line, "td"), "code", name);
    make(line, "td", percent(p) + (isTrue ? " ✓" : ""), "n");
    make(make(line, "td"), "span", "", "share").style.width = 4 * p + "rem";
  };
  for (const [id, piece, p] of best) row(visible(piece), p, id === shown.ids[i]);
  if (about.draws) {
    if (shown.others[i] > 0) row("others that were drawn", shown.others[i], false);
    make(panel, "p", "Shares of " + about.draws + " draws.", "soft");
    return;
  }
  if (about.top_k > best.length) row((about.top_k - best.length) + " more that are kept", shown.others[i], false);
  row("all others (tail)", shown.tail[i], false);
}

function focus(i) {
  const tokens = at("tokens").children;
  if (i < 0 || i >= tokens.length) return;
  for (const each of tokens) each.tabIndex = -1;
  tokens[i].tabIndex = 0;
  tokens[i].focus();
}

function list(sentence, found, more) {
  const box = at("list");
  box.replaceChildren();
  make(box, "p", sentence);
  const items = make(box, "ol");
  for (const each of found) {
    const item = make(items, "li");
    const link = make(item, "a", about.noun + " " + grouped(each.number));
    link.href = "#" + each.number + (each.position === undefined ? "" : "@" + each.position);
    const said = each.position === undefined ? "" : "token " + grouped(each.position) + " … ";
    const surprise = each.surprise === undefined ? "" : nats(each.surprise) + ": ";
    make(item, "span", " " + surprise + said + each.text, "soft");
  }
  if (more) make(box, "button", "Search on").addEventListener("click", () => guarded(more));
}

async function surprising() {
  const answer = await ask("surprising", {});
  list(grouped(answer.sampled) + " of " + grouped(answer.items) + " " + about.noun +
    "s, evenly spread, were ranked by mean surprise. The most surprising of these are:", answer.found);
}

async function search(query, place, before) {
  const answer = await ask("search", {query, file: place[0], entry: place[1]});
  const read = before + answer.read;
  list(grouped(answer.found.length) + " matches here. " + grouped(Math.min(read, about.tokens)) + " of " +
    grouped(about.tokens) + " tokens were searched so far.", answer.found,
    answer.next && (() => search(query, answer.next, read)));
}

function follow() {
  const [number, position] = (location.hash.slice(1) || String(documents ? documents[0].number : 0)).split("@");
  guarded(() => show(Number(number), Number(position || 0)));
}

const go = (number, position = 0) => { location.hash = "#" + number + (position ? "@" + position : ""); };
at("go").addEventListener("submit", (event) => { event.preventDefault(); go(Number(at("number").value)); });
at("next").addEventListener("click", () => go(neighbour(1)));
at("previous").addEventListener("click", () => go(neighbour(-1)));
at("earlier").addEventListener("click", () => go(shown.number, Math.max(0, shown.first - 512)));
at("later").addEventListener("click", () => go(shown.number, shown.first + 512));
at("tokens").addEventListener("keydown", (event) => {
  const steps = {ArrowRight: 1, ArrowDown: 10, ArrowLeft: -1, ArrowUp: -10};
  if (!(event.key in steps)) return;
  event.preventDefault();
  const tokens = [...at("tokens").children];
  focus(Math.min(tokens.length - 1, Math.max(0, tokens.indexOf(document.activeElement) + steps[event.key])));
});

function neighbour(by) {
  if (documents) return (documents[documents.indexOf(shown) + by] || {}).number;
  const number = shown.number + by;
  return number >= 0 && number < about.items ? number : undefined;
}

if (documents) {
  at("finder").remove();
  const opening = (each) => each.texts.slice(0, 16).join("") + (each.texts.length > 16 ? "…" : "");
  list("This file contains:", documents.map((each) => ({number: each.number, text: opening(each)})));
} else {
  at("ranked").addEventListener("click", () => guarded(surprising));
  at("find").addEventListener("submit", (event) => {
    event.preventDefault();
    guarded(() => search(at("query").value, [0, 0], 0));
  });
}
window.addEventListener("hashchange", follow);
follow();
"""

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
