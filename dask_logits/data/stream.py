"""A stream of arbitrary rows: JSON lines, compressed text, a generator, or an object passed to the API.

One reader in the driver cuts rows into chunks and writes those that are due to the spool, one file each. Spooled rows
are not tokenized: workers tokenize in parallel, and a start with mostly committed partitions tokenizes nothing. Each
chunk is a segment of the plan, identified by the hash of its rows. If a part of the stream breaks off, a partition
without rows records it and fails. Later parts are still read.
"""

from __future__ import annotations

import gzip
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from dask_logits.config.groups import DatasetConfig
from dask_logits.data.columns import TEXT, Column, choose_column
from dask_logits.data.source import FileRows, Planned, RowsDigest, Source, write_spool
from dask_logits.data.text_files import located_value
from dask_logits.data.values import BadRow, Value, value_table
from dask_logits.errors import DatasetError, RunConflictError
from dask_logits.run.folder import conflict
from dask_logits.run.plan import Segment
from dask_logits.run.plan_log import PlanLog

logger = logging.getLogger(__name__)

# Maximum rows buffered for an estimate or the calibration.
_HEAD_ROWS = 10_000
# Libraries whose errors mean that a source did not answer.
_NETWORK = ("aiohttp", "httpcore", "httpx", "requests", "urllib3")
# A chunk ends early at this size of text or ids, so that the driver's memory and the spool stay bounded.
_CHUNK_BYTES = 64 << 20


class _Event(NamedTuple):
    """An unprocessed row, or the reason why the rest of its part of the stream cannot be read."""

    part: int
    row: Any = None
    broken: str | None = None


_END = _Event(-1)


class _Chunk(NamedTuple):
    """Consecutive rows and their source. There are no rows where the stream broke off or ended."""

    rows: Any
    source: dict[str, Any]


class RowStream(Source):
    """A stream of rows with one reader.

    Parameters
    ----------
    parts
        Iterables over rows, read in order: the files of a reader, or one object. If a part breaks off, reading
        continues with the next one.
    config
        Settings: the requested columns, the number of rows to use, and whether an unusable row is kept as one without
        tokens. Otherwise its partition fails.
    identity
        Identity of the dataset.
    commit
        Hub commit to which it is pinned.
    file_states
        State of each part's file from a listing, in order. Empty: unknown.
    """

    def __init__(
        self,
        parts: Iterable[Any],
        config: DatasetConfig,
        identity: dict[str, Any],
        *,
        commit: str | None = None,
        file_states: tuple[str, ...] = (),
    ) -> None:
        # Upper bound on the number of rows, or None.
        self.n_rows = config.row_limit
        self._limit = math.inf if self.n_rows is None else self.n_rows
        self.commit = commit
        self.file_states = file_states
        self._identity = identity
        self._config = config
        self._events = _events(parts)
        usable = next((event for event in self._rows_ahead() if not isinstance(event.row, BadRow)), None)
        if usable is None:
            reason = next((event.broken or event.row.reason for event in self._ahead()), "no row")
            raise DatasetError(f"distillation.dataset.name: expected a stream of rows, got {reason}; check the dataset")
        first = usable.row
        self._plain_text = isinstance(first, str)
        if not isinstance(first, str | Mapping):
            raise DatasetError(
                f"dataset: expected a stream of mappings or texts, got {type(first).__name__} {first!r:.80}; make each "
                "row a dict with a text or input_ids column"
            )
        names = [config.text_column or TEXT] if isinstance(first, str) else list(first)
        self.column: Column = choose_column(names, config)

    def identity(self) -> dict[str, Any]:
        """Return the identity of this dataset."""
        return {"dataset.stream": "rows", **self._identity}

    def head(self) -> Iterator[Any]:
        """Yield the first values, up to a limit. They are buffered, because a stream may not be readable twice."""
        size = 0
        for event in itertools.islice(self._rows_ahead(), int(min(self._limit, _HEAD_ROWS))):
            value = self._value(event.row)
            yield value
            size += self._size(value)
            if size >= _CHUNK_BYTES:
                return

    def check(self, log: PlanLog) -> None:
        """Refuse a lower bound, other files, or other first rows. Later rows are compared when they are read again.

        Raises
        ------
        RunConflictError
            With the difference.
        """
        if self._limit < log.n_rows:
            raise conflict(log.run.path, {"dataset.max_samples": (log.n_rows, self.n_rows)})
        failed: set[int] = set()
        first: Segment | None = None
        for segment in log.segments():
            first = first or segment
            if "part" in segment.source:
                failed.add(segment.source["part"])
        manifest = log.run.manifest()
        recorded = () if manifest is None else manifest.files
        for part, (old, new) in enumerate(itertools.zip_longest(recorded, self.file_states)):
            # A file that could not be read may have been fixed.
            if old != new and (part not in failed or old is None or new is None):
                raise conflict(log.run.path, {f"dataset file {part}": (old, new)})
        if first is not None and "content" in first.source and "error" not in first.source:
            ahead = itertools.islice(self._rows_ahead(), first.n_rows)
            found = self._known_by([self._value(event.row) for event in ahead])[1]
            if found != first.source["content"]:
                raise self._other_rows(log, first)

    def plan(self, log: PlanLog, partition_rows: int, wanted: Callable[[int], bool]) -> Iterator[Planned]:
        """Read the stream, compare it with the plan, extend the plan, and spool and yield wanted partitions.

        Parameters
        ----------
        log
            The plan.
        partition_rows
            Rows of a chunk.
        wanted
            Whether the partition with this index is to be computed now.

        Raises
        ------
        RunConflictError
            If the stream's rows differ from the planned ones.
        """
        row = 0
        for segment in log.segments():
            if not segment.n_rows and next(self._ahead(), _END).broken is None:
                log.drop_from(segment, f"partition {segment.first_partition:06d}")
                break
            chunk = self._chunk(row, segment.n_rows)
            if segment.n_rows and "error" in segment.source and "error" not in chunk.source:
                logger.warning("partition %06d can be used now", segment.first_partition)
                segment = log.update_source(segment, chunk.source)
            if len(chunk.rows) != segment.n_rows or chunk.source.get("content") != segment.source.get("content"):
                raise self._other_rows(log, segment)
            row += segment.n_rows
            yield from self._planned(log, segment, chunk, wanted)
        if log.end == "exhausted" or (log.end and log.n_rows == self.n_rows):
            return
        while row < self._limit:
            chunk = self._chunk(row, int(min(partition_rows, self._limit - row)), bounded=True)
            if not len(chunk.rows) and "error" not in chunk.source:
                break
            segment = log.append(((1, len(chunk.rows)),), chunk.source)
            row += segment.n_rows
            yield from self._planned(log, segment, chunk, wanted)
        log.close("max_samples" if row >= self._limit else "exhausted")

    def _other_rows(self, log: PlanLog, segment: Segment) -> RunConflictError:
        last = segment.first_row + segment.n_rows - 1
        return RunConflictError(
            f"{log.run.path}: expected rows {segment.first_row} to {last} of the stream as they were planned, got "
            "others, or fewer; restore the dataset, or start anew in another distillation.teacher.cache_dir",
            {"dataset.content": (segment.source, None)},
        )

    def _planned(
        self, log: PlanLog, segment: Segment, chunk: _Chunk, wanted: Callable[[int], bool]
    ) -> Iterator[Planned]:
        """Spool a chunk if it is wanted and usable."""
        (partition,) = segment.partitions()
        if not wanted(partition.index):
            return
        error = chunk.source.get("error")
        path = log.run.spool_path / f"{partition.name}.arrow"
        files: tuple[FileRows, ...] = ()
        if error is None:
            write_spool(path, chunk.rows)
            digest = chunk.source["content"]
            files = (FileRows(path=str(path), first=0, n_rows=partition.n_rows, kind="spool", digest=digest),)
        yield Planned(
            partition=partition,
            files=files,
            column=self.column,
            error=error,
            n_bytes=path.stat().st_size if files else 0,
        )

    def _chunk(self, first_row: int, n_rows: int, *, bounded: bool = False) -> _Chunk:
        """Read up to `n_rows` rows. Fewer are returned if a part breaks off, the stream ends, or rows are large.

        If a part breaks off before any row, the break itself is the chunk.
        """
        values: list[Any] = []
        size = 0
        failure: dict[str, Any] = {}
        while len(values) < max(1, n_rows) and not (bounded and size >= _CHUNK_BYTES):
            event = next(self._ahead(), _END)
            if event is _END or (event.broken is not None and values):
                break
            next(self._events)
            if event.broken is not None:
                reason = f"dataset row {first_row}: {event.broken}"
                return _Chunk((), {"kind": "stream", "error": reason, "part": event.part})
            self.passed += 1
            value = self._value(event.row)
            if isinstance(value, BadRow) and self._config.on_bad_row == "fail":
                row = first_row + len(values)
                failure = failure or {"error": f"dataset row {row}: {value.reason}; fix the row", "part": event.part}
            size += self._size(value)
            values.append(value)
        rows, content = self._known_by(values)
        return _Chunk(rows, {"kind": "stream", "content": content, **failure})

    def _size(self, value: Value) -> int:
        return 0 if isinstance(value, BadRow) else len(value or ()) * (8 if self.column.kind == "ids" else 1)

    def _known_by(self, values: list[Value]) -> tuple[Any, str]:
        """Return values as an Arrow table, and their hash. An unusable row counts as one without a value."""
        rows = value_table(values, self.column)
        digest = RowsDigest()
        digest.update(rows.column(0))
        return rows, digest.hexdigest()

    def _value(self, row: Any) -> Value:
        """Return the value of a row, or a bad row with the reason, as :func:`located_value` does."""
        if isinstance(row, BadRow):
            return row
        if isinstance(row, str) and not self._plain_text:
            return BadRow(reason=f"expected a column {self.column.name!r}, got str")
        return located_value(row, self.column, self._config)

    def _ahead(self) -> Iterator[_Event]:
        """Yield the next events without consuming them."""
        self._events, ahead = itertools.tee(self._events)
        return ahead

    def _rows_ahead(self) -> Iterator[_Event]:
        """Yield the next rows without consuming them."""
        return (event for event in self._ahead() if event.broken is None)


def _events(parts: Iterable[Any]) -> Iterator[_Event]:
    """Yield the rows of all parts, and an event where one breaks off.

    Raises
    ------
    DatasetError
        If a part cannot be reached. Its rows are not known to be damaged.
    """
    for number, part in enumerate(parts):
        rows = iter(part)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                break
            # A user's generator or a reader's library may raise any error. Rows read before it are complete.
            except Exception as error:
                reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]:.300}"
                if _is_passing(error):
                    raise DatasetError(
                        f"dataset: expected to read on, got {reason}; see that the source can be reached, then run the "
                        "same command again"
                    ) from error
                yield _Event(number, broken=f"the stream broke off here with {reason}")
                break
            yield _Event(number, row)


def _is_passing(error: Exception) -> bool:
    """Whether an error comes from the network or the file system rather than the data."""
    library = type(error).__module__.split(".")[0]
    return (isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile)) or library in _NETWORK
