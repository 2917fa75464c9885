"""The private parts of transformers that reading data uses, each with a test."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from datetime import datetime

_LOCK = threading.Lock()


@contextlib.contextmanager
def dated(template: str, date: str | None) -> Iterator[None]:
    """Have a chat template print this date instead of today's.

    transformers 5.23 gives templates ``strftime_now``, and no way to pass another: it replaces functions that a caller
    passes by text. It keeps compiled templates, so one thread renders at a time.

    Parameters
    ----------
    template
        Text of the template.
    date
        ISO date. None: nothing is changed.
    """
    if date is None:
        yield
        return
    from transformers.utils import chat_template_utils

    names = chat_template_utils._compile_jinja_template(template).globals
    with _LOCK:
        # The template's own names hide those of all templates.
        names["strftime_now"] = datetime.fromisoformat(date).strftime
        try:
            yield
        finally:
            del names["strftime_now"]
