"""Convert JSON, CSV, text and Parquet files to one Arrow file of the used column, in the cache of ``datasets``.

``datasets`` casts every column of every file to the types of the first rows, and stops at the first damaged line.
This module reads only the used column, as text or as token ids, and a bad line affects one row only.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from dask_logits.config.groups import DatasetConfig
from dask_logits.data.columns import Column, choose_column
from dask_logits.data.find import FoundFiles
from dask_logits.data.parquet_files import file_state, parquet_batches, read_footer
from dask_logits.data.text_files import located_value, read_file
from dask_logits.data.values import PROBLEM, BadRow, arrow_values, value_table
from dask_logits.errors import DatasetError
from dask_logits.files.atomic import aside
from dask_logits.run.timings import plural

_VERSION = 3
_BATCH_ROWS = 1_000
# Rows inspected for columns before the column is chosen.
_LOOKED_AT_ROWS = 100


def arrow_file(folder: Path, found: FoundFiles, files: Sequence[str], config: DatasetConfig) -> Path:
    """Return the Arrow file for a list of files, writing it if it does not exist.

    Parameters
    ----------
    folder
        Folder of the Arrow files.
    found
        Their reader and its separator.
    files
        Local paths or URLs, in order.
    config
        Settings with the requested columns.

    Raises
    ------
    DatasetError
        If a file cannot be read to its end, or the column is missing.
    """
    column = choose_column(_columns(found, files), config)
    states = [[file, *vars(file_state(file)).values()] for file in files]
    settings = [found.reader, found.separator, [*vars(column).values()], config.is_column_chosen]
    key = json.dumps([_VERSION, *settings, states])
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.arrow"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    n_rows = 0
    with aside(path) as temporary:
        with temporary.open("wb") as sink:
            with pa.ipc.new_stream(sink, value_table([], column).schema) as writer:
                for table in _tables(found, files, column, config):
                    writer.write_table(table)
                    n_rows += len(table)
            os.fsync(sink.fileno())
        if not n_rows:
            raise _no_rows(files)
        temporary.replace(path)
    return path


def _all_rows(found: FoundFiles, files: Sequence[str]) -> Iterator[Mapping[str, Any] | BadRow]:
    return itertools.chain.from_iterable(read_file(found, file) for file in files)


def _columns(found: FoundFiles, files: Sequence[str]) -> list[str]:
    if found.reader == "parquet":
        return list(dict.fromkeys(name for file in files for name in read_footer(file).columns))
    rows = (row for row in _all_rows(found, files) if not isinstance(row, BadRow))
    first_rows = list(itertools.islice(rows, _LOOKED_AT_ROWS))
    if not first_rows:
        raise _no_rows(files, next(_all_rows(found, files), None))
    return list(dict.fromkeys(name for row in first_rows for name in row))


def _no_rows(files: Sequence[str], bad: object = None) -> DatasetError:
    found = bad.reason if isinstance(bad, BadRow) else f"none in {plural(len(files), 'file')} such as {files[0]!r}"
    return DatasetError(
        f"distillation.dataset.data_files: expected a dataset with at least one row, got {found}; check the files"
    )


def _tables(found: FoundFiles, files: Sequence[str], column: Column, config: DatasetConfig) -> Iterator[pa.Table]:
    if found.reader == "parquet":
        for file in files:
            for batch in parquet_batches(file, column):
                yield _narrow(batch, column)
        return
    values = (row if isinstance(row, BadRow) else located_value(row, column, config) for row in _all_rows(found, files))
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
