"""Parquet files read in place: footers by the planner, row ranges by the workers, local or remote.

A worker keeps its last file open and continues where it stopped, a thousand rows at a time. A huge row group that is
split between partitions is therefore decoded once per worker, not once per partition.

This is the only module that imports ``fsspec`` and ``pyarrow.parquet``.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from dask_logits.data.columns import Column
from dask_logits.data.values import Value, arrow_values
from dask_logits.errors import DatasetError, first_line

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

_BATCH_ROWS = 1_000
# Delays between attempts to reach a file.
_WAIT_SECONDS = (1.0, 4.0, 15.0)
_READ_BYTES = 4 << 20
# Keys of file-system metadata that change with the content.
_TAGS = ("etag", "ETag", "blob_id", "oid", "md5Hash")


@dataclass(frozen=True, kw_only=True)
class FileState:
    """Metadata of a file from a listing, without opening it.

    Parameters
    ----------
    size
        Bytes.
    etag
        The store's tag of the content, None if there is none.
    modified
        Modification time of a local file, None otherwise.
    """

    size: int
    etag: str | None
    modified: float | None

    def __str__(self) -> str:
        return f"{self.size} bytes, etag {self.etag}"


@dataclass(frozen=True, kw_only=True)
class Footer:
    """Content of a Parquet footer.

    Parameters
    ----------
    digest
        SHA-256 of the footer: row groups, their locations, sizes and statistics.
    row_groups
        Rows of each row group.
    columns
        Column names.
    """

    digest: str
    row_groups: tuple[int, ...]
    columns: tuple[str, ...]


def file_state(path: str) -> FileState:
    """Query the file system about a file.

    Raises
    ------
    DatasetError
        If the file does not exist, or the store does not answer.
    """
    system, inside = _file_system(path)
    try:
        facts = patiently(path, lambda: system.info(inside))
    except OSError as error:
        raise unreachable(path, error) from error
    tag = next((str(facts[name]) for name in _TAGS if facts.get(name)), None)
    return FileState(size=int(facts.get("size") or 0), etag=tag, modified=facts.get("mtime"))


def patiently(path: str, call: Callable[[], _T]) -> _T:
    """Retry a call while the store does not answer.

    Raises
    ------
    DatasetError
        If the received bytes are damaged. This is not retried.
    OSError
        If the file no longer exists, or several attempts got no answer.
    """
    for wait in _WAIT_SECONDS:
        try:
            return call()
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except OSError as error:
            logger.warning("%s: %s; again in %.0f s", path, error, wait)
            time.sleep(wait)
    return call()


def unreachable(path: str, error: OSError) -> DatasetError:
    """Build the error for a file that is currently unreadable but not known to be damaged."""
    return DatasetError(
        f"{path}: expected to read it, got {error}; see that it can be reached, then run the same command again"
    )


def read_footer(path: str) -> Footer:
    """Read the footer of a Parquet file.

    Raises
    ------
    DatasetError
        If it is not a complete Parquet file.
    """
    import pyarrow.parquet as pq

    with _readable(path), open_bytes(path) as file:
        metadata = pq.read_metadata(file)
        # Its length and the magic bytes come after it.
        file.seek(-metadata.serialized_size - 8, 2)
        digest = hashlib.sha256(file.read()).hexdigest()
    return Footer(
        digest=digest,
        row_groups=tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)),
        columns=tuple(metadata.schema.to_arrow_schema().names),
    )


def read_parquet(path: str, column: Column, first: int, n_rows: int, *, footer: str | None = None) -> list[Value]:
    """Read a range of rows of one column. Padding is removed from token ids.

    Parameters
    ----------
    path
        Path or URL.
    column
        The column.
    first, n_rows
        The range, in rows of the file.
    footer
        Digest of the planned footer. None: not checked.

    Raises
    ------
    DatasetError
        If the file is damaged, differs from the planned one, or lacks the column.
    OSError
        If it cannot be read now.
    """
    global _OPEN
    cursor, _OPEN = _OPEN, None
    if cursor is None or cursor.key != (path, column, footer):
        if cursor is not None:
            cursor.close()
        cursor = _Cursor(path, column, footer)
    try:
        rows = cursor.read(first, n_rows)
    except BaseException:
        cursor.close()
        raise
    _OPEN = cursor
    return rows


def parquet_batches(path: str, column: Column) -> Iterator[Any]:
    """Return all rows of a file: the used column, and those read beside it.

    Raises
    ------
    DatasetError
        If the file is damaged or lacks the column.
    """
    return all_batches(path, _used_columns(path, column, read_footer(path)))


def all_batches(path: str, columns: list[str] | None = None) -> Iterator[Any]:
    """Yield all rows of a file with some columns (None: all), read on demand."""
    import pyarrow.parquet as pq

    with open_bytes(path) as file, _readable(path):
        yield from pq.ParquetFile(file, pre_buffer=False).iter_batches(_BATCH_ROWS, columns=columns)


def _used_columns(path: str, column: Column, footer: Footer) -> list[str]:
    """Return the columns to read. Of a struct, only the used field is read."""
    head = column.name if column.name in footer.columns else column.head
    for name, found in ((column.name, head), (column.mask, column.mask)):
        if found is not None and found not in footer.columns:
            raise DatasetError(f"{path}: expected a column {name!r}, got {list(footer.columns)}; take the file out")
    return [column.name, *(name for name in column.beside if name in footer.columns)]


class _Cursor:
    """Reads one column of one file forward."""

    def __init__(self, path: str, column: Column, footer: str | None) -> None:
        import pyarrow.parquet as pq

        self.key = (path, column, footer)
        found = read_footer(path)
        if footer is not None and found.digest != footer:
            raise DatasetError(
                f"{path}: expected the file that was planned, got another one in its place; restore it, or start anew "
                "with distillation.teacher.generation.force_regenerate=true"
            )
        self._columns = _used_columns(path, column, found)
        self._starts = [0, *itertools.accumulate(found.row_groups)]
        with _readable(path):
            self._file = open_bytes(path)
            self._reader = pq.ParquetFile(self._file, pre_buffer=False, buffer_size=_READ_BYTES)
        self._values: Iterator[Value] = iter(())
        self._position = self._group_end = 0

    def read(self, first: int, n_rows: int) -> list[Value]:
        rows: list[Value] = []
        with _readable(f"{self.key[0]}, rows {first} to {first + n_rows - 1}"):
            while len(rows) < n_rows:
                rows += self._read_group(first + len(rows), n_rows - len(rows))
        return rows

    def _read_group(self, first: int, n_rows: int) -> list[Value]:
        """Read rows up to the end of their row group. Rows before them are skipped, from its start or the position."""
        path, column, _ = self.key
        if not self._position <= first < self._group_end:
            if first >= self._starts[-1]:
                raise DatasetError(f"{path}: expected row {first}, got {self._starts[-1]} rows; restore the file")
            group = bisect.bisect_right(self._starts, first) - 1
            batches = self._reader.iter_batches(_BATCH_ROWS, row_groups=[group], columns=self._columns)
            self._values = (value for batch in batches for value in arrow_values(batch, column))
            self._position, self._group_end = self._starts[group], self._starts[group + 1]
        last = min(first + n_rows, self._group_end)
        rows = list(itertools.islice(self._values, first - self._position, last - self._position))
        if not rows:
            raise DatasetError(f"{path}: expected row {first}, got the end of its row group; restore the file")
        self._position = first + len(rows)
        return rows

    def close(self) -> None:
        self._file.close()


# The last file read by this process.
_OPEN: _Cursor | None = None


def open_bytes(path: str) -> Any:
    """Open a file for reading, local or remote."""
    system, inside = _file_system(path)
    return system.open(inside, "rb", block_size=_READ_BYTES)


def _file_system(path: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        system, inside = url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise DatasetError(
            f"distillation.dataset.data_files: cannot read {path!r}: {needed_for(path, error)}"
        ) from error
    return system, str(inside)


def needed_for(path: str, error: Exception) -> str:
    """Return the package to install for a URL, or else the error message.

    >>> needed_for("s3://bucket/a.parquet", ImportError("Install s3fs to access S3"))
    "run pip install -c constraints.txt '.[s3]' in the checkout of dask_logits"
    """
    scheme = path.split("://")[0]
    extra = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}.get(scheme)
    if extra and isinstance(error, ImportError):
        return f"run pip install -c constraints.txt '.[{extra}]' in the checkout of dask_logits"
    return f"{first_line(error)}; install an fsspec file system for {scheme}://" if "://" in path else first_line(error)


@contextlib.contextmanager
def _readable(where: str) -> Iterator[None]:
    """Translate Arrow's errors for damaged bytes of a file."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        # For broken pages and thrift data Arrow raises an OSError without a system error number.
        if not isinstance(error, pa.ArrowException) and (type(error) is not OSError or error.errno is not None):
            raise
        raise DatasetError(f"{where}: expected readable Parquet, got {first_line(error)}; restore the file") from error
