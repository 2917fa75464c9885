"""Locations of rows, their readers, and the digest that identifies them.

Three kinds of files are read: Arrow files of a regular dataset, spooled chunks of a stream, and Parquet files in place.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import pyarrow as pa

from dask_logits.data.columns import Column
from dask_logits.data.parquet_files import read_parquet
from dask_logits.data.values import LISTS, PROBLEM, arrow_values, with_problems
from dask_logits.errors import DatasetError
from dask_logits.files.atomic import aside
from dask_logits.records import Array
from dask_logits.run.plan import Partition
from dask_logits.run.plan_log import PlanLog

SAMPLE_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class FileRows:
    """A range of rows of one file.

    Parameters
    ----------
    path
        Path, or URL of a Parquet file.
    first, n_rows
        The range.
    kind
        ``arrow``, ``spool`` or ``parquet``.
    digest
        Expected digest of a Parquet footer or of spooled rows. None: not checked.
    """

    path: str
    first: int
    n_rows: int
    kind: Literal["arrow", "spool", "parquet"] = "arrow"
    digest: str | None = None


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A partition that is due, and the location of its rows.

    Parameters
    ----------
    partition
        Its place in the plan.
    files, column
        Files and column for the worker.
    error
        Reason why it cannot be computed. None: it can.
    n_bytes
        Size in the spool.
    """

    partition: Partition
    files: tuple[FileRows, ...]
    column: Column
    error: str | None = None
    n_bytes: int = 0


class Source(Protocol):
    """Interface of a dataset for the job, and what most datasets have in common."""

    column: Column
    # Number of used rows, an upper bound for a stream, or None if there is none.
    n_rows: int | None
    streams: bool = True
    # Hub commit to which it is pinned.
    commit: str | None = None
    # State of its files from a listing, where the plan does not record each file.
    file_states: tuple[str, ...] = ()
    # Grows during reading, whether or not a partition is due.
    passed: int = 0

    def identity(self) -> dict[str, Any]:
        """Return its identity, except for the content of its rows, which the plan holds."""
        return {}

    def check(self, log: PlanLog) -> None:
        """Refuse a source that differs from the planned one of a run."""

    def sample(self) -> list[tuple[int, Any]]:
        """Return a sample of (row number, row), for estimates: the first ones."""
        return list(enumerate(itertools.islice(self.head(), SAMPLE_ROWS)))

    def head(self) -> Iterator[Any]:
        """Yield the rows from the first, for the calibration."""

    def plan(self, log: PlanLog, partition_rows: int, wanted: Callable[[int], bool]) -> Iterator[Planned]:
        """Yield the wanted partitions. Missing segments are appended to the plan."""


class RowsDigest:
    """SHA-256 of rows by content: lengths and values in order, independent of chunks and storage."""

    def __init__(self) -> None:
        self._lengths, self._values = hashlib.sha256(), hashlib.sha256()

    def update(self, column: Any) -> None:
        """Add an Arrow array or chunked array of texts or of lists of ids."""
        for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
            if any(is_list(chunk.type) for is_list in LISTS):
                rows = chunk.cast(pa.large_list(pa.int64()))
                self._lengths.update(_lengths(rows).tobytes())
                self._values.update(rows.flatten().to_numpy(zero_copy_only=False).astype("<i8").tobytes())
            else:
                texts = chunk if pa.types.is_binary(chunk.type) else chunk.cast(pa.large_string())
                rows = texts.cast(pa.large_binary())
                self._lengths.update(_lengths(rows).tobytes())
                for value in rows:
                    if value.is_valid:
                        self._values.update(value.as_buffer())

    def hexdigest(self) -> str:
        """Return the digest of the rows so far."""
        return hashlib.sha256(self._lengths.digest() + self._values.digest()).hexdigest()


def read_rows(files: Sequence[FileRows], column: Column) -> list[Any]:
    """Read consecutive rows: texts, chats, or token ids without padding. Unusable rows are returned as ``BadRow``.

    Raises
    ------
    DatasetError
        If a file is damaged, has changed since it was planned, or lacks the column.
    OSError
        If it cannot be read now.
    """
    rows: list[Any] = []
    for file in files:
        match file.kind:
            case "arrow":
                table = open_arrow(file.path).with_format("arrow")[file.first : file.first + file.n_rows]
                rows += arrow_values(table, column)
            case "spool":
                rows += _read_spool(file)
            case "parquet":
                rows += read_parquet(file.path, column, file.first, file.n_rows, footer=file.digest)
    return rows


def open_arrow(path: str) -> Any:
    """Memory-map an Arrow file as a dataset."""
    state = Path(path).stat()
    return _map_arrow(path, state.st_ino, state.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _map_arrow(path: str, inode: int, changed: int) -> Any:
    """Memory-map an Arrow file. Its state is part of the cache key, because a worker may outlive an older file."""
    from datasets import Dataset

    return Dataset.from_file(path)


def write_spool(path: Path, rows: Any) -> None:
    """Write a table of a stream's values atomically to the spool for workers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside(path) as temporary:
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_stream(file, rows.schema) as writer:
            writer.write_table(rows)
        temporary.replace(path)


def _read_spool(file: FileRows) -> list[Any]:
    with pa.OSFile(file.path, "rb") as source, pa.ipc.open_stream(source) as reader:
        table = reader.read_all()
    digest = RowsDigest()
    digest.update(table.column(0))
    if digest.hexdigest() != file.digest:
        raise DatasetError(
            f"{file.path}: expected rows with SHA-256 {str(file.digest)[:16]}…, got {digest.hexdigest()[:16]}…; run "
            "the same command again: the stream is read again"
        )
    return with_problems(table.column(0).to_pylist(), table[PROBLEM].to_pylist())


def _lengths(rows: Any) -> Array:
    import pyarrow.compute as pc

    counts = pc.binary_length(rows) if pa.types.is_large_binary(rows.type) else pc.list_value_length(rows)
    filled: Array = counts.fill_null(-1).to_numpy(zero_copy_only=False).astype("<i8")
    return filled
