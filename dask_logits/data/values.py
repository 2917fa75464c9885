"""Extract one value from a dataset row: a text, or token ids without padding, or the reason why it has none.

All readers use these functions, so that regular datasets, streams, Parquet files and lists treat a row alike. An
unusable row becomes a :class:`BadRow`, which is handled according to ``distillation.dataset.on_bad_row``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from dask_logits.config import nearest
from dask_logits.errors import DatasetError

TEXT = "text"
IDS = "input_ids"
MASK = "attention_mask"
# Column of this package's Arrow files, beside the values: the reason why a row has none.
PROBLEM = "__problem__"
_CHATS = ("messages", "conversations", "conversation", "chat", "dialog")
_CHAT_ADVICE = (
    "chat columns are not supported yet: render each chat to a text first with "
    "tokenizer.apply_chat_template(messages, tokenize=False), and set distillation.dataset.add_special_tokens=false"
)
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
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


Value = str | list[int] | BadRow | None


def choose_column(columns: Sequence[str], text_column: str | None) -> str:
    """Return the column that contains the documents.

    Parameters
    ----------
    columns
        Columns of the dataset.
    text_column
        The requested column, or the path of a field inside a struct such as ``doc.text``. None: ``text``, or
        ``input_ids`` if there is no ``text``.

    Raises
    ------
    DatasetError
        If the column is missing, or `text_column` is None and both columns exist.

    Examples
    --------
    >>> choose_column(["id", "text"], None), choose_column(["text", "input_ids"], "input_ids")
    ('text', 'input_ids')
    """
    where = "distillation.dataset.text_column"
    if text_column is not None:
        if text_column in columns or text_column.split(".")[0] in columns:
            return text_column
        raise DatasetError(
            f"{where}: expected one of the columns {list(columns)}, got {text_column!r}{nearest(text_column, columns)}"
        )
    if TEXT in columns and IDS in columns:
        raise DatasetError(
            f"{where}: the dataset has both a column {TEXT!r} and a column {IDS!r}, which may come from another "
            f"model's tokenizer; set {where}={TEXT} to tokenize the text, or {where}={IDS} to use the ids"
        )
    if TEXT in columns or IDS in columns:
        return TEXT if TEXT in columns else IDS
    chat = next((name for name in _CHATS if name in columns), None)
    if chat is not None:
        raise DatasetError(
            f"{where}: expected a column {TEXT!r} or {IDS!r}, got the chat column {chat!r}; {_CHAT_ADVICE}"
        )
    raise DatasetError(
        f"{where}: expected one of the columns {list(columns)}, got null, and none of them is {TEXT!r} or {IDS!r}; set "
        "it to the column that holds the text"
    )


def both_columns() -> DatasetError:
    """Build the error for a row with both a text and token ids when no column was chosen."""
    try:
        choose_column([TEXT, IDS], None)
    except DatasetError as error:
        return error
    raise AssertionError


def row_value(row: Any, column: str) -> Value:
    """Return the value of a column of one row.

    Parameters
    ----------
    row
        A mapping of columns, or a plain text.
    column
        Column, or the path of a field inside a struct.

    Examples
    --------
    >>> row_value({"input_ids": [0, 0, 5, 7], "attention_mask": [0, 0, 1, 1]}, "input_ids")
    [5, 7]
    >>> row_value({"doc": {"text": "red"}}, "doc.text")
    'red'
    >>> row_value({"text": 3}, "text")
    BadRow(reason='expected a text, got int 3')
    """
    if isinstance(row, str):
        return check_text(row)
    if not isinstance(row, Mapping):
        return BadRow(reason=f"expected a column {column!r}, got {type(row).__name__}")
    if column in row:
        value = row[column]
    else:
        value = row
        for name in column.split("."):
            if value is None and value is not row:
                return None
            if not isinstance(value, Mapping) or name not in value:
                names = sorted(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
                return BadRow(reason=f"expected a column {column!r}, got {names}")
            value = value[name]
    return check_ids(value, row.get(MASK)) if column == IDS else check_text(value)


def check_text(value: Any) -> str | BadRow | None:
    """Return a text or None. Any other value is a bad row."""
    if value is None:
        return None
    if not isinstance(value, str):
        reason = f"expected a text, got {type(value).__name__} {value!r:.80}"
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            reason += f"; {_CHAT_ADVICE}"
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
    marks = _plain_list(mask)
    if marks is None or len(marks) != len(ids):
        found = f"{len(marks)}" if marks is not None else f"{type(mask).__name__}"
        return BadRow(reason=f"expected an {MASK} of {len(ids)} entries, one for each of the {IDS}, got {found}")
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


def _plain_list(value: Any) -> list[Any] | None:
    if isinstance(value, list):
        items = value
    elif isinstance(value, tuple | range):
        items = list(value)
    elif hasattr(value, "tolist"):
        items = value.tolist()
    else:
        return None
    if not isinstance(items, list):
        return None
    return [int(item) if isinstance(item, np.integer) else item for item in items] if _has_numpy(items) else items


def _has_numpy(items: list[Any]) -> bool:
    return bool(items) and isinstance(items[0], np.generic)


def type_problem(kind: pa.DataType, column: str) -> str | None:
    """Return the reason why a column of an Arrow type cannot hold documents, or None if it can."""
    if pa.types.is_null(kind):
        return None
    if column == IDS:
        if any(is_list(kind) for is_list in _LISTS):
            inner = kind.value_type
            return None if pa.types.is_integer(inner) or pa.types.is_null(inner) else f"lists of {inner}"
        return str(kind)
    return None if any(is_string(kind) for is_string in _STRINGS) else str(kind)


def arrow_values(batch: pa.RecordBatch | pa.Table, column: str) -> list[Value]:
    """Return the values of a column of Arrow rows. A text with invalid UTF-8 is a bad row."""
    head = column if column in batch.column_names else column.split(".")[0]
    values = _python_values(batch.column(head))
    if head == column and column != IDS:
        return [value if isinstance(value, BadRow) else check_text(value) for value in values]
    masks = _python_values(batch.column(MASK)) if column == IDS and MASK in batch.column_names else [None] * len(values)
    rows = ({head: value, MASK: mask} for value, mask in zip(values, masks, strict=True))
    return [
        value if isinstance(value, BadRow) else row_value(row, column) for value, row in zip(values, rows, strict=True)
    ]


def _python_values(array: Any) -> list[Any]:
    try:
        values: list[Any] = array.to_pylist()
        return values
    except UnicodeDecodeError:
        # Parquet and Arrow files may hold unvalidated texts.
        return [_decoded(value) for value in array.cast(pa.large_binary()).to_pylist()]


def _decoded(value: bytes | None) -> str | BadRow | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError as error:
        return BadRow(reason=f"expected a text, got bytes that are not valid UTF-8 ({error})")


def value_table(values: Sequence[Value], column: str) -> pa.Table:
    """Return values as an Arrow table: the column, and the reasons for missing values."""
    usable = [None if isinstance(value, BadRow) else value for value in values]
    kind = pa.large_list(pa.int64()) if column == IDS else pa.large_string()
    problems = [value.reason if isinstance(value, BadRow) else None for value in values]
    return pa.table({column: pa.array(usable, kind), PROBLEM: pa.array(problems, pa.string())})


def with_problems(values: Sequence[Any], problems: Sequence[str | None]) -> list[Any]:
    """Insert bad rows in place of their missing values."""
    return [value if reason is None else BadRow(reason=reason) for value, reason in zip(values, problems, strict=True)]
