"""Choose the columns that hold a dataset's documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

from dask_logits.config.groups import DatasetConfig
from dask_logits.config.setting import nearest
from dask_logits.errors import DatasetError

TEXT = "text"
IDS = "input_ids"
MASK = "attention_mask"
# Functions that the model may call in a chat, beside its messages.
TOOLS = "tools"
_CHATS = ("messages", "conversations", "conversation", "chat", "dialog")
_WHERE = "distillation.dataset"


@dataclass(frozen=True, kw_only=True)
class Column:
    """The column of the documents.

    Parameters
    ----------
    name
        Its name, or the path of a field inside a struct.
    kind
        What it holds.
    mask
        Column that says which token ids a student learns. None: all of them.
    """

    name: str
    kind: Literal["text", "ids", "chat"] = "text"
    mask: str | None = None

    @classmethod
    def named(cls, name: str) -> Self:
        """Return a column of texts, or of token ids if it has their name."""
        return cls(name=name, kind="ids" if name == IDS else "text")

    @property
    def head(self) -> str:
        """Name of the outermost column.

        >>> Column(name="doc.text").head
        'doc'
        """
        return self.name.split(".")[0]

    @property
    def beside(self) -> tuple[str, ...]:
        """Further columns that are read where they exist."""
        others = {"ids": (MASK, self.mask), "chat": (TOOLS,), "text": ()}[self.kind]
        return tuple(name for name in others if name is not None)


def choose_column(columns: Sequence[str], wanted: DatasetConfig, *, is_converted: bool = False) -> Column:
    """Return the column that contains the documents.

    Parameters
    ----------
    columns
        Columns of the dataset.
    wanted
        Settings with the requested columns. If none is: ``text``, or ``input_ids`` if there is no ``text``.
    is_converted
        Whether the columns are those of this package's Arrow files, in which token ids contain their mask.

    Raises
    ------
    DatasetError
        If a column is missing, or none is requested and both ``text`` and ``input_ids`` exist.

    Examples
    --------
    >>> choose_column(["id", "text"], DatasetConfig()).name
    'text'
    >>> choose_column(["text", "input_ids"], DatasetConfig(text_column="input_ids")).kind
    'ids'
    """
    if wanted.messages_column is not None:
        return Column(name=_existing(columns, "messages_column", wanted.messages_column), kind="chat")
    column = Column.named(_document_column(columns, wanted.text_column))
    mask = wanted.mask_column
    if mask is None:
        return column
    if column.kind != "ids":
        raise DatasetError(
            f"{_WHERE}.mask_column: expected null for the column {column.name!r}, which holds text, got "
            f"{mask!r}; a mask belongs to token ids: set {_WHERE}.text_column={IDS}"
        )
    # A mask is read beside the ids, so it cannot be a field of another column.
    if not is_converted:
        _existing(columns, "mask_column", mask, fields=False)
    return replace(column, mask=mask)


def _existing(columns: Sequence[str], setting: str, name: str, *, fields: bool = True) -> str:
    if name in columns or (fields and name.split(".")[0] in columns):
        return name
    raise DatasetError(
        f"{_WHERE}.{setting}: expected one of the columns {list(columns)}, got {name!r}{nearest(name, columns)}"
    )


def _document_column(columns: Sequence[str], text_column: str | None) -> str:
    where = f"{_WHERE}.text_column"
    if text_column is not None:
        return _existing(columns, "text_column", text_column)
    if TEXT in columns and IDS in columns:
        raise both_columns()
    if TEXT in columns or IDS in columns:
        return TEXT if TEXT in columns else IDS
    chat = next((name for name in _CHATS if name in columns), None)
    if chat is not None:
        raise DatasetError(
            f"{where}: expected a column {TEXT!r} or {IDS!r}, got the chat column {chat!r}; {chat_advice(chat)}"
        )
    raise DatasetError(
        f"{where}: expected one of the columns {list(columns)}, got null, and none of them is {TEXT!r} or {IDS!r}; set "
        "it to the column that holds the text"
    )


def chat_advice(column: str) -> str:
    """Return how to read a column of chats."""
    return f"for chats, set {_WHERE}.messages_column={column}"


def both_columns() -> DatasetError:
    """Build the error for a row with both a text and token ids when no column was chosen."""
    where = f"{_WHERE}.text_column"
    return DatasetError(
        f"{where}: the dataset has both a column {TEXT!r} and a column {IDS!r}, which may come from another "
        f"model's tokenizer; set {where}={TEXT} to tokenize the text, or {where}={IDS} to use the ids"
    )
