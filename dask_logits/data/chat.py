"""Chats: from a row's messages to token ids, with a mask of the assistant's turns.

A chat travels between reader and tokenizer as JSON text, ``{"messages": […], "tools": […]}``. The tokenizer's own
template renders it. The assistant's turns come from the template's generation markers. Without markers they are found
by rendering the messages before each turn: that text, with the prompt for an answer, must be the beginning of the whole
text, and the turn ends where the rendering of the messages up to it ends. Both are compared with the whole text. A
template may render more while a turn is the last one, such as its thoughts: the rest has to follow at the turn's start.
A row whose turns cannot be found is refused, never guessed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dask_logits.data.transformers_internals import dated
from dask_logits.data.values import BadRow
from dask_logits.errors import TeacherError, first_line
from dask_logits.records import Array

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_CURE = "mark the assistant's turns in the template with {% generation %}, or set distillation.dataset.learn=all"


def template_digest(tokenizer: Any) -> str:
    """Return the SHA-256 of a tokenizer's chat templates.

    Raises
    ------
    TeacherError
        If it has none, or cannot say which characters a token stands for.
    """
    where = "distillation.dataset.messages_column"
    templates = getattr(tokenizer, "chat_template", None)
    if not templates:
        raise TeacherError(
            f"{where}: expected a tokenizer with a chat template, got one without; set "
            "distillation.teacher.tokenizer_path to that of a model for chats"
        )
    if not tokenizer.is_fast:
        raise TeacherError(
            f"{where}: expected a fast tokenizer, which says where its tokens begin, got "
            f"{type(tokenizer).__name__}; use the fast one of this model"
        )
    return hashlib.sha256(json.dumps(templates, sort_keys=True).encode()).hexdigest()


def has_date(tokenizer: Any) -> bool:
    """Whether a chat template of a tokenizer prints the date."""
    return "strftime_now" in json.dumps(tokenizer.chat_template)


def encode_chat(tokenizer: Any, chat: str, *, marks: bool, date: str | None = None) -> tuple[list[int], Array] | BadRow:
    """Return a chat's token ids, and which of them the assistant wrote.

    Parameters
    ----------
    tokenizer
        A tokenizer with a chat template.
    chat
        JSON of the messages and tools.
    marks
        Whether to find the assistant's turns. Otherwise every token is marked.
    date
        ISO date that the template prints. None: today.

    Returns
    -------
    ids, mask or BadRow
        [T] ids and bool, or the reason why the chat cannot be rendered, or its turns not be found.
    """
    parsed = json.loads(chat)
    messages, tools = parsed["messages"], parsed.get("tools")
    spans: list[tuple[int, int]] | BadRow
    try:
        template = tokenizer.get_chat_template(None, tools)
        with dated(template, date):
            messages = _with_texts(tokenizer, messages, tools)
            if marks and _MARKER.search(template):
                text, spans = _marked(tokenizer, messages, tools, template)
            else:
                text = _rendered(tokenizer, messages, tools)
                spans = _turns(tokenizer, messages, tools, text) if marks else [(0, len(text))]
    # A template may raise any error, its own exception among them.
    except Exception as error:  # noqa: BLE001
        return BadRow(reason=f"expected messages for the tokenizer's chat template, got {first_line(error)}")
    if isinstance(spans, BadRow):
        return spans
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    bounds = [_inner(text, start, end) for start, end in encoded["offset_mapping"]]
    starts_T, ends_T = np.array(bounds, np.int64).reshape(-1, 2).T
    mask_T = np.zeros(len(bounds), bool)
    for start, end in spans:
        mask_T |= (starts_T >= start) & (ends_T <= end) & (ends_T > start)
    return list(encoded["input_ids"]), mask_T


def _inner(text: str, start: int, end: int) -> tuple[int, int]:
    """Return a token's characters without white space at its ends, which some tokenizers count and others do not."""
    token = text[start:end]
    if not token.strip():
        return start, end
    return start + len(token) - len(token.lstrip()), end - len(token) + len(token.rstrip())


def _rendered(tokenizer: Any, messages: list[Any], tools: Any, *, prompts: bool = False) -> str:
    return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompts))


def _with_texts(tokenizer: Any, messages: list[Any], tools: Any) -> list[Any]:
    """Join the texts of contents that are lists of parts, if the template does not read such lists.

    Many templates print a list as Python does, or leave it out. Other texts in the place of the parts show it, because
    a short text may stand elsewhere.

    Raises
    ------
    ValueError
        If a part is no text.
    """
    contents = {i: message["content"] for i, message in enumerate(messages) if _has_parts(message)}
    if not contents:
        return messages
    other = next((part for content in contents.values() for part in content if not _is_text(part)), None)
    if other is not None:
        raise ValueError(f"a content with a part other than text, which is not scored: {other!r:.80}")

    def replaced(by: Mapping[int, Any]) -> list[Any]:
        return [{**message, "content": by[i]} if i in by else message for i, message in enumerate(messages)]

    probes = {
        i: [{**part, "text": f"part-{i}-{j}."} for j, part in enumerate(content or [{"type": "text"}])]
        for i, content in contents.items()
    }
    # A template may raise any error about lists.
    with contextlib.suppress(Exception):
        text = _rendered(tokenizer, replaced(probes), tools)
        printed = (form for parts in probes.values() for form in (str(parts), json.dumps(parts, ensure_ascii=False)))
        if all(part["text"] in text for parts in probes.values() for part in parts) and not any(
            form in text for form in printed
        ):
            return messages
    return replaced({i: "".join(part["text"] for part in content) for i, content in contents.items()})


def _has_parts(message: Mapping[str, Any]) -> bool:
    """Whether a content is a list of parts. A tool may answer with a list of its own."""
    content = message.get("content")
    if message["role"] in ("tool", "ipython") and isinstance(content, list):
        return bool(content) and all(isinstance(part, dict) and isinstance(part.get("type"), str) for part in content)
    return isinstance(content, list)


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)


def _marked(tokenizer: Any, messages: list[Any], tools: Any, template: str) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a chat, and the characters [start, end) between its generation markers.

    The tokens that transformers 5.23 marks are wrong where such a character belongs to no token, or to several.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    names = tokenizer.special_tokens_map
    texts, spans = render_jinja_template(
        [messages], tools=tools, chat_template=template, return_assistant_tokens_mask=True, **names
    )
    return texts[0], spans[0]


def _turns(tokenizer: Any, messages: list[Any], tools: Any, text: str) -> list[tuple[int, int]] | BadRow:
    """Return the characters [start, end) of the text that each turn of the assistant takes."""
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = (
            _rendered(tokenizer, messages[:i], tools, prompts=True) if i else _opening(tokenizer, message, tools, text)
        )
        if before is None:
            return BadRow(
                reason="expected a chat template with a prompt for answers, to find where the first message begins, "
                f"got another; {_CURE}"
            )
        start: int | None = len(before)
        if not text.startswith(before):
            start = _start(_rendered(tokenizer, messages[:i], tools), before, text, message)
        until = _rendered(tokenizer, messages[: i + 1], tools)
        end = len(until) if text.startswith(until) else None if start is None else _end(until, text, start)
        if start is None or end is None or end < start:
            return BadRow(
                reason=f"expected a chat template that renders message {i} the same whether or not others follow, got "
                f"another; {_CURE}"
            )
        spans.append((start, end))
    return spans


def _opening(tokenizer: Any, message: Any, tools: Any, text: str) -> str | None:
    """Return the text before a first message of the assistant, which may hold the template's own system message."""
    alone = _rendered(tokenizer, [message], tools)
    prompted = _rendered(tokenizer, [message], tools, prompts=True)
    prompt = prompted[len(alone) :]
    if not prompt or not prompted.startswith(alone) or prompt not in text:
        return None
    # Nothing precedes the turn: it is learned as a whole.
    return "" if text.startswith(prompt) else text[: text.index(prompt) + len(prompt)]


def _start(base: str, before: str, text: str, message: Mapping[str, Any]) -> int | None:
    """Return where a turn begins if the prompt also opens thoughts: where text and prompt part, and the answer stands.

    Both have to go on from `base`, the text without a prompt, with the header of the turn.
    """
    content = message.get("content")
    answer = content.split("</think>")[-1].strip() if isinstance(content, str) else ""
    if not answer or not (before.startswith(base) and text.startswith(base)):
        return None
    parting = next(i for i in range(len(base), len(before)) if before[i] != text[i : i + 1])
    spaces = len(text[parting:]) - len(text[parting:].lstrip())
    # An answer such as "<b>" begins as the prompt's "<think>" does, and so before they part.
    place = text.find(answer, max(len(base) + 1, parting - len(answer)), parting + spaces + len(answer))
    return min(place, parting) if place >= 0 else None


def _end(until: str, text: str, start: int) -> int | None:
    """Return the end of a turn that is rendered with more before it, such as its thoughts, while it is the last one.

    The turn is the longest end of that rendering with which the text goes on at `start`.
    """
    for cut in range(start, len(until)):
        # The first characters differ almost always, and to compare them copies little.
        if text.startswith(until[cut : cut + 32], start) and text.startswith(until[cut:], start):
            return start + len(until) - cut if until[cut:].strip() else None
    return None
