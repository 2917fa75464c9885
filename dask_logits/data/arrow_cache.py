"""Convert JSON, CSV, text and Parquet files to one Arrow file of the used column, in the cache of ``datasets``.

``datasets`` casts every column of every file to the types of the first rows, and stops at the first damaged line.
This module reads only the used column, as text or as token ids, and a bad line affects one row only.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import lzma
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from dask_logits.data.columns import Column, ColumnSettings, choose_column
from dask_logits.data.parquet_files import file_state, parquet_batches, read_footer
from dask_logits.data.text_files import located_value, read_file
from dask_logits.data.values import PROBLEM, BadRow, arrow_values, value_table
from dask_logits.errors import DatasetError, first_line
from dask_logits.files.atomic import aside
from dask_logits.run.timings import plural

_VERSION = 3
_BATCH_ROWS = 1_000
# Rows inspected for columns before the column is chosen.
_LOOKED_AT_ROWS = 100


def arrow_file(folder: Path, reader: str, files: Sequence[str], separator: str | None, wanted: ColumnSettings) -> Path:
    """Return the Arrow file for a list of files, writing it if it does not exist.

    Parameters
    ----------
    folder
        Folder of the Arrow files.
    reader
        ``json``, ``csv``, ``text`` or ``parquet``.
    files
        Local paths or URLs, in order.
    separator
        Separator of CSV fields. None: detected from the header.
    wanted
        The requested columns.

    Raises
    ------
    DatasetError
        If a file cannot be read to its end, or the column is missing.
    """
    column = choose_column(_columns(reader, files, separator), wanted)
    states = [[file, *vars(file_state(file)).values()] for file in files]
    key = json.dumps([_VERSION, reader, separator, [*vars(column).values()], wanted.is_chosen, states])
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.arrow"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    n_rows = 0
    with aside(path) as temporary:
        with temporary.open("wb") as sink:
            with pa.ipc.new_stream(sink, value_table([], column).schema) as writer:
                for table in _tables(reader, files, separator, column, chosen=wanted.is_chosen):
                    writer.write_table(table)
                    n_rows += len(table)
            os.fsync(sink.fileno())
        if not n_rows:
            raise _no_rows(files)
        temporary.replace(path)
    return path


def file_rows(path: str, reader: str, separator: str | None) -> Iterator[Mapping[str, Any] | BadRow]:
    """Yield the rows of a text file, and translate the libraries' errors for damaged data.

    Raises
    ------
    DatasetError
        If the file cannot be read to its end.
    """
    try:
        yield from read_file(path, reader, separator)
    except (EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, OSError) as error:
        # Arrow (for Zstandard) and gzip raise an OSError for damaged data, without a system error number.
        if isinstance(error, OSError) and (error.errno is not None or isinstance(error, FileNotFoundError)):
            raise
        raise DatasetError(
            f"{path}: expected to read the file to its end, got {type(error).__name__}: {first_line(error)}; restore "
            "the file"
        ) from error


def _columns(reader: str, files: Sequence[str], separator: str | None) -> list[str]:
    if reader == "parquet":
        return list(dict.fromkeys(name for file in files for name in read_footer(file).columns))
    rows = (row for file in files for row in file_rows(file, reader, separator))
    bad: BadRow | None = None
    names: dict[str, None] = {}
    n_rows = 0
    for row in rows:
        if isinstance(row, BadRow):
            bad = bad or row
            continue
        names |= dict.fromkeys(row)
        n_rows += 1
        if n_rows == _LOOKED_AT_ROWS:
            break
    if not n_rows:
        raise _no_rows(files, bad)
    return list(names)


def _no_rows(files: Sequence[str], bad: BadRow | None = None) -> DatasetError:
    found = f"none in {plural(len(files), 'file')} such as {files[0]!r}" if bad is None else bad.reason
    return DatasetError(
        f"distillation.dataset.data_files: expected a dataset with at least one row, got {found}; check the files"
    )


def _tables(
    reader: str, files: Sequence[str], separator: str | None, column: Column, *, chosen: bool
) -> Iterator[pa.Table]:
    if reader == "parquet":
        for file in files:
            for batch in parquet_batches(file, column):
                yield _narrow(batch, column)
        return
    values = (
        row if isinstance(row, BadRow) else located_value(row, column, is_chosen=chosen)
        for file in files
        for row in file_rows(file, reader, separator)
    )
    while batch := list(itertools.islice(values, _BATCH_ROWS)):
        yield value_table(batch, column)


def _narrow(batch: pa.RecordBatch, column: Column) -> pa.Table:
    """Return the used column of Parquet rows, without inspecting each row if its type allows it."""
    kind = batch.schema.field(0).type
    plain = column.kind == "text" and column.name in batch.schema.names
    if plain and (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        texts = batch.column(0).cast(pa.large_string())
        with contextlib.suppress(pa.ArrowInvalid):
            texts.validate(full=True)
            return pa.table({column.name: texts, PROBLEM: pa.nulls(len(texts), pa.string())})
    return value_table(arrow_values(batch, column), column)
