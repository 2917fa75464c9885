"""Rows of JSON, CSV, TSV and text files, local or remote, compressed or not.

Only the used column is inspected, so other columns may differ between files. An unreadable line is one bad row, named
by file and line, and reading continues with the next line. Texts are never interpreted: ``NA`` and ``null`` in a CSV
file remain texts.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Iterator, Mapping
from typing import IO, Any

import pyarrow as pa

from dask_logits.config.groups import DatasetConfig
from dask_logits.data.columns import IDS, TEXT, Column, both_columns
from dask_logits.data.find import FoundFiles
from dask_logits.data.parquet_files import open_bytes
from dask_logits.data.values import BadRow, Value, row_value
from dask_logits.errors import DatasetError, first_line

_READ_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
# First bytes of Zstandard's 16 kinds of skippable frames.
_SKIPPABLE = tuple(bytes([0x50 + kind]) for kind in range(16))


def read_file(found: FoundFiles, path: str) -> Iterator[Mapping[str, Any] | BadRow]:
    """Yield the rows of a file in order.

    Parameters
    ----------
    found
        Its reader: ``json`` (lines, or one array of objects), ``csv`` (with a header line), or ``text`` (one row per
        line). The separator of CSV fields is a tab if none is known and the header has one and no comma, else a comma.
    path
        Path or URL. gzip, bzip2, xz and Zstandard are recognized by their first bytes.

    Raises
    ------
    DatasetError
        If the file as a whole is not of this kind, or damaged.
    OSError
        If it cannot be read now.
    """
    with _readable(path), open_bytes(path) as raw, _decompressed(raw) as stream:
        match found.reader:
            case "json":
                yield from _json_rows(path, stream)
            case "csv":
                yield from _csv_rows(path, stream, found.separator)
            case _:
                for number, line in _numbered(stream):
                    text = _text(path, number, line.removesuffix(b"\n").removesuffix(b"\r"))
                    yield text if isinstance(text, BadRow) else {TEXT: text}


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    """Translate the libraries' errors for damaged data of a file."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, OSError) as error:
        # Arrow (for Zstandard) and gzip raise an OSError for damaged data, without a system error number.
        if isinstance(error, OSError) and (error.errno is not None or isinstance(error, FileNotFoundError)):
            raise
        raise DatasetError(
            f"{path}: expected to read the file to its end, got {type(error).__name__}: {first_line(error)}; restore "
            "the file"
        ) from error


def _decompressed(raw: Any) -> Any:
    buffered: Any = raw if hasattr(raw, "peek") else io.BufferedReader(raw, _READ_BYTES)
    head = buffered.peek(8)[:8]
    if head.startswith(b"\x1f\x8b"):
        return gzip.open(buffered)
    if head.startswith(b"\xfd7zXZ\x00"):
        return lzma.open(buffered)
    if head.startswith(b"BZh") and head[4:8] == b"1AY&":
        return bz2.open(buffered)
    # A frame, or a skippable one, with which pzstd begins each part of a file.
    if head.startswith(b"\x28\xb5\x2f\xfd") or (head[:1] in _SKIPPABLE and head[1:4] == b"\x2a\x4d\x18"):
        # Arrow reads all frames of a file, and refuses a truncated one.
        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(buffered, mode="r"), "zstd"), _READ_BYTES)
    if head.startswith(b"PK\x03\x04"):
        raise DatasetError("expected text, got a zip archive; unpack it first")
    return buffered


def _numbered(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(stream, 1):
        yield number, line.removeprefix(_BOM) if number == 1 else line


def _text(path: str, number: int, line: bytes) -> str | BadRow:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        return _bad(path, number, f"expected UTF-8, got {error}")


def _bad(path: str, number: int, reason: str) -> BadRow:
    return BadRow(reason=f"{path}, line {number}: {reason}")


def _json_rows(path: str, stream: IO[bytes]) -> Iterator[Mapping[str, Any] | BadRow]:
    for number, line in _numbered(stream):
        stripped = line.strip()
        if not stripped:
            continue
        if number == 1 and (stripped.startswith(b"[") or stripped == b"{"):
            yield from _json_document(path, line + stream.read())
            return
        text = _text(path, number, stripped)
        yield text if isinstance(text, BadRow) else _json_row(path, number, text)


def _json_row(path: str, number: int, text: str) -> Mapping[str, Any] | BadRow:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        return _bad(path, number, f"expected a JSON object, got {error} in {text!r:.60}")
    if isinstance(row, Mapping):
        return _Located(row, path, number)
    return _bad(path, number, f"expected a JSON object, got {type(row).__name__} {text!r:.60}")


def _json_document(path: str, content: bytes) -> Iterator[Mapping[str, Any] | BadRow]:
    """Yield the rows of a file that contains one JSON value: an array of objects."""
    try:
        rows = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise DatasetError(
            f"{path}: expected JSON lines, or one JSON array of objects, got {error}; fix the file"
        ) from error
    if isinstance(rows, Mapping):
        raise DatasetError(
            f"{path}: expected JSON lines, or one JSON array of objects, got one object with the keys "
            f"{sorted(rows)!r:.200}; write each row as one line"
        )
    for number, row in enumerate(rows):
        if isinstance(row, Mapping):
            yield row
        else:
            yield BadRow(reason=f"{path}, entry {number}: expected a JSON object, got {type(row).__name__}")


class _Located(dict[str, Any]):
    """A row with its line number, for messages about its values."""

    def __init__(self, row: Mapping[str, Any], path: str, number: int) -> None:
        super().__init__(row)
        self.where = f"{path}, line {number}"


def located_value(row: Any, column: Column, config: DatasetConfig) -> Value:
    """Return the value of a row. The reason of a bad one names file and line, if the row has them.

    Raises
    ------
    DatasetError
        If the row has both a text and token ids, and no column was chosen. The first rows may have had only one.
    """
    other = {TEXT: IDS, IDS: TEXT}.get(column.name)
    if not config.is_column_chosen and isinstance(row, Mapping) and other is not None and row.get(other) is not None:
        raise both_columns()
    value = row_value(row, column)
    if isinstance(value, BadRow) and isinstance(row, _Located):
        return BadRow(reason=f"{row.where}: {value.reason}")
    return value


def _csv_rows(path: str, stream: IO[bytes], separator: str | None) -> Iterator[Mapping[str, Any] | BadRow]:
    # The library's limit of 128 KiB is too small for documents.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    # Invalid UTF-8 becomes lone surrogates, which the check of the value detects.
    with io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        header_line = lines.readline()
        if separator is None:
            separator = "\t" if "\t" in header_line and "," not in header_line else ","
        header = next(csv.reader([header_line], delimiter=separator), [])
        reader = csv.reader(lines, delimiter=separator, strict=True)
        while True:
            # The first line of the row. The header is line 1.
            number = reader.line_num + 2
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if "unexpected end of data" in str(error):
                    # No bad row, because the rows after it are in it.
                    raise DatasetError(
                        f"{path}: the quote that opens at line {number} is never closed; fix the file"
                    ) from error
                yield _bad(path, number, f"expected {len(header)} fields, got {error}")
                continue
            if len(fields) == len(header):
                yield _Located(dict(zip(header, fields, strict=True)), path, number)
            elif fields:
                yield _bad(path, number, f"expected {len(header)} fields, got {len(fields)}")
