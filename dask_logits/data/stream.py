"""A stream of any rows: JSON lines, compressed text, a generator, an object given to the API.

One reader in the driver cuts rows into chunks and leaves those that are due in the spool, a file each. Rows are spooled
as they came, not tokenised: workers tokenise in parallel, and a start that finds most partitions committed tokenises
nothing. Each chunk is a segment of the plan, known by the hash of its rows. What breaks off in the middle is a
partition of no rows, which fails; the parts after it are read all the same.
"""

from __future__ import annotations

import gzip
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from dask_logits.data.source import FileRows, Planned, RowsDigest, write_spool
from dask_logits.data.text_files import located
from dask_logits.data.values import (
    IDS,
    TEXT,
    BadRow,
    Value,
    both_columns,
    choose_column,
    row_value,
    value_table,
)
from dask_logits.errors import DatasetError, RunConflictError
from dask_logits.run.folder import conflict
from dask_logits.run.plan import Segment
from dask_logits.run.plan_log import PlanLog

logger = logging.getLogger(__name__)

_SAMPLE_ROWS = 256
# Rows that an estimate or the calibration may hold back.
_HEAD_ROWS = 10_000
# Libraries whose errors say that a source did not answer.
_NETWORK = ("aiohttp", "httpcore", "httpx", "requests", "urllib3")
# A chunk ends early at so many bytes of text or ids, so that the driver and the spool stay bounded.
_CHUNK_BYTES = 64 << 20


class _Row(NamedTuple):
    """A row as it came, and the part of the stream it is from."""

    row: Any
    part: int


class _Broken(NamedTuple):
    """In place of a row: the rest of this part of the stream cannot be read."""

    reason: str
    part: int


class _Chunk(NamedTuple):
    """Consecutive rows, or none where the stream broke off or ended; and what they are known by."""

    rows: Any
    source: dict[str, Any]


class RowStream:
    """Any stream of rows, with one reader.

    Parameters
    ----------
    parts
        Iterables over rows, one after the other: the files of a reader, or one object. A part that breaks off ends
        there, and the next one is read.
    text_column
        Column that was asked for.
    limit
        Rows used, from the first; None: all.
    identity
        What tells the dataset from others.
    commit
        Hub commit it is pinned to.
    file_states
        What a listing says of each part's file, in order; empty: nothing.
    skips
        Whether a row that cannot be used is kept as one without a token; else its partition fails.
    """

    streams = True

    def __init__(
        self,
        parts: Iterable[Any],
        text_column: str | None,
        limit: int | None,
        identity: dict[str, Any],
        commit: str | None = None,
        file_states: tuple[str, ...] = (),
        *,
        skips: bool = False,
    ) -> None:
        self.limit = limit
        self.commit = commit
        self.file_states = file_states
        # Rows passed so far, wanted or not.
        self.passed = 0
        self._identity = identity
        self._skips = skips
        self._is_chosen = text_column is not None
        self._events = _events(parts)
        self._buffer: deque[Any] = deque()
        self._plain_text = False
        found = next((event for event in self._peeked() if isinstance(event, _Row) and not _is_bad(event.row)), None)
        if found is None:
            reasons = (event.row.reason if isinstance(event, _Row) else event.reason for event in self._buffer)
            reason = next(reasons, "no row")
            raise DatasetError(f"distillation.dataset.name: expected a stream of rows, got {reason}; check the dataset")
        first = found.row
        self._plain_text = isinstance(first, str)
        if not isinstance(first, str | Mapping):
            raise DatasetError(
                f"dataset: expected a stream of mappings or texts, got {type(first).__name__} {first!r:.80}; make each "
                "row a dict with a text or input_ids column"
            )
        self.column = text_column or TEXT if isinstance(first, str) else choose_column(list(first), text_column)

    @property
    def is_text(self) -> bool:
        """Whether rows must be tokenised."""
        return self.column != IDS

    @property
    def n_rows(self) -> int | None:
        """Upper bound of the rows; None if there is none."""
        return self.limit

    def identity(self) -> dict[str, Any]:
        """Return what tells this dataset from others."""
        return {"dataset.stream": "rows", **self._identity}

    def sample(self) -> list[tuple[int, Any]]:
        """Return (row number, row) of the first rows, for estimates."""
        return list(enumerate(itertools.islice(self.head(), _SAMPLE_ROWS)))

    def head(self) -> Iterator[Any]:
        """Yield the values from the first, within bounds: they are kept, as a stream may not be read twice."""
        rows = (event.row for event in self._peeked() if isinstance(event, _Row))
        bound = _HEAD_ROWS if self.limit is None else min(self.limit, _HEAD_ROWS)
        size = 0
        for number, row in enumerate(itertools.islice(rows, bound)):
            value = self._value(row, number)
            yield value
            size += self._size(value)
            if size >= _CHUNK_BYTES:
                return

    def check(self, log: PlanLog) -> None:
        """Refuse a lower bound, other files, or other first rows; later rows are compared as they are read again.

        Raises
        ------
        RunConflictError
            With the difference.
        """
        if self.limit is not None and self.limit < log.n_rows:
            raise conflict(log.run.path, {"dataset.max_samples": (log.n_rows, self.limit)})
        failed: set[int] = set()
        first: Segment | None = None
        for segment in log.segments():
            first = first or segment
            if "part" in segment.source:
                failed.add(segment.source["part"])
        recorded = tuple((log.run.manifest() or {}).get("files", ()))
        for part, (old, new) in enumerate(itertools.zip_longest(recorded, self.file_states)):
            # A file that could not be read may be mended.
            if old != new and (part not in failed or old is None or new is None):
                raise conflict(log.run.path, {f"dataset file {part}": (old, new)})
        if first is not None and "content" in first.source and "error" not in first.source:
            ahead = itertools.islice((event for event in self._peeked() if isinstance(event, _Row)), first.n_rows)
            found = self._known_by([self._value(event.row, number) for number, event in enumerate(ahead)])[1]
            if found != first.source["content"]:
                raise self._other_rows(log, first)

    def plan(self, log: PlanLog, partition_rows: int, wanted: Callable[[int], bool]) -> Iterator[Planned]:
        """Read the stream, compare what was planned before, plan the rest; spool and yield what is wanted.

        Parameters
        ----------
        log
            The plan.
        partition_rows
            Rows of a chunk.
        wanted
            Whether a partition of this index is to be computed now.

        Raises
        ------
        RunConflictError
            If the stream does not hold the rows it held when it was planned.
        """
        row = 0
        for segment in log.segments():
            if not segment.n_rows and not isinstance(next(self._peeked(), None), _Broken):
                logger.warning("partition %06d can be read now: what follows is planned anew", segment.first_partition)
                log.drop_from(segment)
                break
            chunk = self._chunk(row, segment.n_rows)
            if segment.n_rows and "error" in segment.source and "error" not in chunk.source:
                logger.warning("partition %06d can be used now", segment.first_partition)
                segment = log.mend(segment, chunk.source)
            if len(chunk.rows) != segment.n_rows or chunk.source.get("content") != segment.source.get("content"):
                raise self._other_rows(log, segment)
            row += segment.n_rows
            yield from self._planned(log, segment, chunk, wanted)
        if log.end == "exhausted" or (log.end and log.n_rows == self.limit):
            return
        while self.limit is None or row < self.limit:
            left = partition_rows if self.limit is None else min(partition_rows, self.limit - row)
            chunk = self._chunk(row, left, bounded=True)
            if not len(chunk.rows) and "error" not in chunk.source:
                break
            segment = log.append(((1, len(chunk.rows)),), chunk.source)
            row += segment.n_rows
            yield from self._planned(log, segment, chunk, wanted)
        log.close("max_samples" if self.limit is not None and row >= self.limit else "exhausted")

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
        """Spool a chunk, if it is wanted and usable."""
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
        """Read up to so many rows; fewer where a part breaks off, the stream ends, or they are large.

        Without a row before it, the break itself is the chunk.
        """
        values: list[Any] = []
        size = 0
        failure: dict[str, Any] = {}
        while len(values) < max(1, n_rows) and not (bounded and size >= _CHUNK_BYTES):
            event = next(self._peeked(), None)
            if event is None or (isinstance(event, _Broken) and values):
                break
            self._buffer.popleft()
            if isinstance(event, _Broken):
                reason = f"dataset row {first_row}: {event.reason}"
                return _Chunk((), {"kind": "stream", "error": reason, "part": event.part})
            self.passed += 1
            value = self._value(event.row, first_row + len(values))
            if isinstance(value, BadRow) and not self._skips:
                row = first_row + len(values)
                failure = failure or {"error": f"dataset row {row}: {value.reason}; fix the row", "part": event.part}
            size += self._size(value)
            values.append(value)
        rows, content = self._known_by(values)
        return _Chunk(rows, {"kind": "stream", "content": content, **failure})

    def _size(self, value: Value) -> int:
        return 0 if isinstance(value, BadRow) else len(value or ()) * (1 if self.is_text else 8)

    def _known_by(self, values: list[Value]) -> tuple[Any, str]:
        """Return values as an Arrow table, and their hash; a row that cannot be used counts as one without a value."""
        rows = value_table(values, self.column)
        digest = RowsDigest()
        digest.update(rows.column(0))
        return rows, digest.hexdigest()

    def _value(self, row: Any, number: int) -> Value:
        """Take the value out of a row, or say what is wrong with it.

        Raises
        ------
        DatasetError
            If the row has both a text and token ids, and no column was chosen.
        """
        if isinstance(row, BadRow):
            return row
        if isinstance(row, str) and not self._plain_text:
            return BadRow(reason=f"expected a column {self.column!r}, got str")
        other = {TEXT: IDS, IDS: TEXT}.get(self.column)
        if not self._is_chosen and isinstance(row, Mapping) and other is not None and row.get(other) is not None:
            raise both_columns()
        value: Value = located(row, row_value(row, self.column))
        return value

    def _peeked(self) -> Iterator[Any]:
        """Yield what comes next without taking it."""
        for ahead in itertools.count():
            if ahead == len(self._buffer):
                event = next(self._events, None)
                if event is None:
                    return
                self._buffer.append(event)
            yield self._buffer[ahead]


def _is_bad(row: Any) -> bool:
    return isinstance(row, BadRow)


def _events(parts: Iterable[Any]) -> Iterator[_Row | _Broken]:
    """Yield the rows of all parts, and where one breaks off.

    Raises
    ------
    DatasetError
        If a part cannot be reached: nothing is known to be wrong with its rows.
    """
    for number, part in enumerate(parts):
        rows = iter(part)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                break
            # Whatever a user's generator or a reader's library raises, what was read before it is whole.
            except Exception as error:
                reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]:.300}"
                if _is_passing(error):
                    raise DatasetError(
                        f"dataset: expected to read on, got {reason}; see that the source can be reached, then run the "
                        "same command again"
                    ) from error
                yield _Broken(f"the stream broke off here with {reason}", number)
                break
            yield _Row(row, number)


def _is_passing(error: Exception) -> bool:
    """Whether an error is the network's or the file system's, not the data's."""
    library = type(error).__module__.split(".")[0]
    return (isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile)) or library in _NETWORK
