"""Extract one value from a dataset row: a text, a chat, or token ids without padding, or the reason why it has none.

All readers use these functions, so that regular datasets, streams, Parquet files and lists treat a row alike. An
unusable row becomes a :class:`BadRow`, which is handled according to ``distillation.dataset.on_bad_row``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, time
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa

from dask_logits.data.columns import MASK, TOOLS, Column, chat_advice

# Column of this package's Arrow files, beside the values: the reason why a row has none.
PROBLEM = "__problem__"
# Roles of a widespread format of chats, with the keys ``from`` and ``value``.
_ROLES = {"human": "user", "gpt": "assistant"}
LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
_STRINGS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """A row that cannot be used.

    Parameters
    ----------
    reason
        The expected and the actual value, with file and line if known.
    """

    reason: str


# A chat is the JSON text of its messages and tools. A token id that a student does not learn is kept as its
# complement, ~id, which is negative, so that ids and their mask are one value.
Value = str | list[int] | BadRow | None


def row_value(row: Any, column: Column) -> Value:
    """Return the value of a column of one row.

    Parameters
    ----------
    row
        A mapping of columns, or a plain text.
    column
        The column.

    Examples
    --------
    >>> row_value({"input_ids": [0, 0, 5, 7], "attention_mask": [0, 0, 1, 1]}, Column.named("input_ids"))
    [5, 7]
    >>> row_value({"doc": {"text": "red"}}, Column.named("doc.text"))
    'red'
    >>> row_value({"text": 3}, Column.named("text"))
    BadRow(reason='expected a text, got int 3')
    """
    if isinstance(row, str):
        return check_text(row)
    if not isinstance(row, Mapping):
        return BadRow(reason=f"expected a column {column.name!r}, got {type(row).__name__}")
    if column.name in row:
        value = row[column.name]
    else:
        value = row
        for name in column.name.split("."):
            if value is None or isinstance(value, BadRow):
                return value
            if not isinstance(value, Mapping) or name not in value:
                names = sorted(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
                return BadRow(reason=f"expected a column {column.name!r}, got {names}")
            value = value[name]
    if isinstance(value, BadRow):
        return value
    match column.kind:
        case "text":
            return check_text(value)
        case "chat":
            return check_chat(value, row.get(TOOLS))
        case "ids":
            if column.mask is not None and value is not None:
                value = _with_learned(check_ids(value), row.get(column.mask), column.mask)
            return value if isinstance(value, BadRow) else check_ids(value, row.get(MASK))


def check_chat(value: Any, tools: Any = None) -> str | BadRow | None:
    """Return a chat as JSON text, None for one without messages.

    Parameters
    ----------
    value
        A list of messages with ``role`` and ``content`` (or ``from`` and ``value``), a mapping with such a list as
        ``messages``, or JSON of one of them.
    tools
        Functions that the model may call: a list of mappings, or its JSON. An empty text: none.

    Examples
    --------
    >>> check_chat([{"role": "user", "content": "Hi", "name": None}])
    '{"messages": [{"role": "user", "content": "Hi"}]}'
    """
    is_text, is_tools_text = isinstance(value, str), isinstance(tools, str)
    if isinstance(tools, str) and not tools.strip():
        tools = None
    try:
        value, tools = (json.loads(one) if isinstance(one, str) else one for one in (value, tools))
    except (ValueError, RecursionError) as error:
        return BadRow(reason=f"expected messages, or JSON of them, got text that is none ({error})")
    if isinstance(value, Mapping) and "messages" in value:
        if value.get("tools"):
            tools, is_tools_text = value["tools"], is_text
        value = value["messages"]
    found = [] if value is None else _plain_list(value)
    if found is None or not all(isinstance(message, Mapping) for message in found):
        return BadRow(reason=f"expected a list of messages with role and content, got {type(value).__name__}")
    # Nulls inside of a JSON text are those of a call or a schema.
    messages = [_message(_without_none(message, nested=not is_text)) for message in found]
    wrong = next((message for message in messages if not isinstance(message.get("role"), str)), None)
    if wrong is not None:
        return BadRow(reason=f"expected messages with role and content, got one with {sorted(map(str, wrong))}")
    chat = {"messages": messages, **({"tools": tools if is_tools_text else _without_none(tools)} if tools else {})}
    try:
        text = json.dumps(chat, ensure_ascii=False, default=_plain)
    except (TypeError, ValueError) as error:
        return BadRow(reason=f"expected messages of text, numbers, lists and mappings, got {error}")
    return check_text(text) if messages else None


def _plain(value: Any) -> str:
    """Return a time or a decimal number, which JSON does not have, as text."""
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    raise TypeError(f"{type(value).__name__} {value!r:.80}")


def _message(message: Any) -> Any:
    if "role" in message or "from" not in message:
        return message
    others = {name: value for name, value in message.items() if name not in ("from", "value")}
    return {"role": _ROLES.get(message["from"], message["from"]), "content": message.get("value", ""), **others}


def _without_none(value: Any, *, nested: bool = True) -> Any:
    """Drop keys without a value, which Arrow adds so that all rows have the same keys."""
    if isinstance(value, Mapping):
        return {name: _without_none(item) if nested else item for name, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _with_learned(ids: Any, learned: Any, name: str) -> Any:
    """Store the ids that a student does not learn as a mask or a column of labels says."""
    if isinstance(ids, BadRow):
        return ids
    marks = _marks(learned, len(ids), name)
    if isinstance(marks, BadRow):
        return marks
    if any(one < 0 for one in ids):
        return BadRow(reason=f"expected token ids of at least 0, got {min(ids)}")
    if set(marks) - {0, 1}:
        odd = next((i for i, (mark, one) in enumerate(zip(marks, ids, strict=True)) if mark not in (-100, one)), None)
        if odd is not None:
            return BadRow(
                reason=f"expected a mask of 0 and 1 in {name!r}, or labels that are the token ids or -100, got "
                f"{marks[odd]!r} at position {odd}, where the token id is {ids[odd]}"
            )
        marks = [mark != -100 for mark in marks]
    return with_mask(ids, marks)


def with_mask(ids: Iterable[int], marks: Iterable[Any]) -> list[int]:
    """Store the ids that a student does not learn as their complement."""
    return [one if mark else ~one for one, mark in zip(ids, marks, strict=True)]


def check_text(value: Any) -> str | BadRow | None:
    """Return a text or None. Any other value is a bad row."""
    if value is None:
        return None
    if not isinstance(value, str):
        reason = f"expected a text, got {type(value).__name__} {value!r:.80}"
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            reason += f"; {chat_advice('COLUMN')}"
        elif isinstance(value, list | tuple) and value and isinstance(value[0], str):
            reason += "; give each row one text (is this a batch of rows?)"
        elif isinstance(value, Mapping):
            reason += "; name a field of it, such as distillation.dataset.text_column=COLUMN.FIELD"
        return BadRow(reason=reason)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return BadRow(reason=f"expected a text, got one that is not valid Unicode ({error})")
    return value


def check_ids(value: Any, mask: Any = None) -> list[int] | BadRow | None:
    """Return a flat list of token ids without masked positions.

    Parameters
    ----------
    value
        Ids: a list, a tuple, an array, or None.
    mask
        1 for each valid position, 0 for padding. None: all are valid.
    """
    if value is None:
        return None
    ids = _plain_list(value)
    if ids is None:
        return BadRow(reason=f"expected a list of token ids, got {type(value).__name__} {value!r:.80}")
    if set(map(type, ids)) - {int}:
        place, wrong = next((i, one) for i, one in enumerate(ids) if type(one) is not int)
        if isinstance(wrong, list | tuple):
            return BadRow(
                reason=f"expected a flat list of token ids, got a list at position {place}: {wrong!r:.60}; give each "
                "document its own row (is this a batch of rows?)"
            )
        shown = "null" if wrong is None else f"{type(wrong).__name__} {wrong!r:.60}"
        return BadRow(reason=f"expected a flat list of token ids, which are integers, got {shown} at position {place}")
    return ids if mask is None else _masked(ids, mask)


def _masked(ids: list[int], mask: Any) -> list[int] | BadRow:
    marks = _marks(mask, len(ids), MASK)
    if isinstance(marks, BadRow):
        return marks
    if set(marks) - {0, 1}:
        wrong = next(mark for mark in marks if mark not in (0, 1))
        return BadRow(reason=f"expected an {MASK} of 0 and 1, got {wrong!r}")
    count = sum(marks)
    if not count:
        return []
    first = marks.index(1)
    if not all(marks[first : first + count]):
        return BadRow(
            reason=f"expected an {MASK} that leaves out padding at the beginning and the end only, got a 0 between "
            f"ones at position {marks.index(0, first)}; remove the positions or the {MASK} column"
        )
    return ids[first : first + count]


def _marks(value: Any, count: int, name: str) -> list[Any] | BadRow:
    """Return the entries of a column beside token ids."""
    marks = _plain_list(value)
    if marks is not None and len(marks) == count:
        return marks
    found = type(value).__name__ if marks is None else len(marks)
    return BadRow(reason=f"expected {count} entries in {name!r}, one for each of the token ids, got {found}")


def _plain_list(value: Any) -> list[Any] | None:
    items = list(value) if isinstance(value, tuple | range) else value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(items, list):
        return None
    has_numpy = bool(items) and isinstance(items[0], np.generic)
    return [int(item) if isinstance(item, np.integer) else item for item in items] if has_numpy else items


def type_problem(kind: pa.DataType, column: Column) -> str | None:
    """Return the reason why a column of an Arrow type cannot hold documents, or None if it can."""
    is_list = any(is_list(kind) for is_list in LISTS)
    item = kind.value_type if is_list else kind
    is_text = isinstance(kind, pa.JsonType) or any(is_string(kind) for is_string in _STRINGS)
    fits = {
        "text": is_text,
        "chat": is_text or pa.types.is_struct(item) or isinstance(item, pa.JsonType),
        "ids": is_list and (pa.types.is_integer(item) or pa.types.is_null(item)),
    }
    if pa.types.is_null(kind) or fits[column.kind]:
        return None
    return f"lists of {item}" if is_list and column.kind == "ids" else str(kind)


def arrow_values(batch: pa.RecordBatch | pa.Table, column: Column) -> list[Value]:
    """Return the values of a column of Arrow rows. Texts with invalid UTF-8, and rows that a reader marked, are bad."""
    names = batch.column_names
    head = column.name if column.name in names else column.head
    if column.mask not in names:
        # This package's own Arrow files hold ids with their mask.
        column = replace(column, mask=None)
    used = [head, *(name for name in column.beside if name in names)]
    columns = [_python_values(batch.column(name)) for name in used]
    values: list[Value]
    if head == column.name and column.kind == "text":
        values = [value if isinstance(value, BadRow) else check_text(value) for value in columns[0]]
    else:
        values = [row_value(dict(zip(used, row, strict=True)), column) for row in zip(*columns, strict=True)]
    return with_problems(values, batch.column(PROBLEM).to_pylist()) if PROBLEM in names else values


def python_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Return Arrow rows as mappings, with bad rows in place of values that cannot be read."""
    columns = [_python_values(column) for column in batch.columns]
    return [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


def _python_values(array: Any) -> list[Any]:
    decode = _json_decoder(array.type)
    try:
        values: list[Any] = array.to_pylist()
    except UnicodeDecodeError:
        # Parquet and Arrow files may hold unvalidated texts.
        values = [_python_value(array[i]) for i in range(len(array))]
    return [value if isinstance(value, BadRow) else decode(value) for value in values] if decode else values


def _json_decoder(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """Return a function that decodes the JSON texts in values of a type, None if the type has none.

    ``datasets`` stores values of mixed types as JSON texts (``datasets.Json``), which Arrow returns as they are.
    """
    if isinstance(kind, pa.JsonType):
        return _from_json
    if any(is_list(kind) for is_list in LISTS):
        item = _json_decoder(kind.value_type)
        return item and (lambda values: None if values is None else [item(value) for value in values])
    if pa.types.is_struct(kind):
        fields = {field.name: decode for field in kind if (decode := _json_decoder(field.type))}
        if fields:
            return lambda value: value and {n: fields[n](v) if n in fields else v for n, v in value.items()}
    return None


def _from_json(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return text


def _python_value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return BadRow(reason=f"expected a text, got bytes that are not valid UTF-8 ({error})")


def value_table(values: Sequence[Value], column: Column) -> pa.Table:
    """Return values as an Arrow table: the column, and the reasons for missing values."""
    usable = [None if isinstance(value, BadRow) else value for value in values]
    kind = pa.large_list(pa.int64()) if column.kind == "ids" else pa.large_string()
    problems = [value.reason if isinstance(value, BadRow) else None for value in values]
    return pa.table({column.name: pa.array(usable, kind), PROBLEM: pa.array(problems, pa.string())})


def with_problems(values: Sequence[Any], problems: Sequence[str | None]) -> list[Any]:
    """Insert bad rows in place of their missing values."""
    return [value if reason is None else BadRow(reason=reason) for value, reason in zip(values, problems, strict=True)]
