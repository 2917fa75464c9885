"use strict";
const live = document.getElementById("live"), note = document.getElementById("note");
async function refresh() {
  try {
    const answer = await fetch(location.pathname + "/body" + location.search, {cache: "no-store"});
    if (!answer.ok) throw new Error(answer.status);
    const next = document.createElement("div");
    next.innerHTML = await answer.text();
    const parts = [...next.children];
    if (parts.length !== live.children.length) live.replaceChildren(...parts);
    else parts.forEach((part, i) => {
      if (part.outerHTML !== live.children[i].outerHTML) live.children[i].replaceWith(part);
    });
    note.textContent = "";
  } catch (error) {
    note.textContent = "The scheduler does not answer. These are the last figures that it sent.";
  }
  setTimeout(refresh, document.hidden ? 20000 : 2000);
}
setTimeout(refresh, 2000);
