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
